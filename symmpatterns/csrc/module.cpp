// The Python module. Everything here is checked and documented in host_backend.py, which is what others import.
#include <torch/csrc/python_headers.h>

#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdlib>

#include "errors.h"
#include "fused.h"
#include "host_memory.h"
#include "norm.h"
#include "python_hooks.h"
#include "rendezvous.h"
#include "segment.h"

namespace py = pybind11;

namespace symmpatterns {
namespace {

// Set by host_backend.py; never released, because threads may still wait while the interpreter is taken down.
struct FromPython {
  PyObject* error = PyExc_RuntimeError;
  PyObject* timeout = PyExc_RuntimeError;
  PyObject* divergence = PyExc_RuntimeError;
  PyObject* timeout_s = nullptr; // callable: the default limit of a wait
} from_python;

void configure(const py::object& error, const py::object& timeout, const py::object& divergence, const py::object& limit) {
  from_python = {
      py::object(error).release().ptr(),
      py::object(timeout).release().ptr(),
      py::object(divergence).release().ptr(),
      py::object(limit).release().ptr()};
}

using T = at::Tensor;
using Maybe = std::optional<at::Tensor>;
using Scales = std::pair<Maybe, Maybe>;

// `workspace` is what host_backend.py makes of a Workspace: (staging_ptrs, flag_ptrs, state, rank, group, timeout_s, site).
// Runs operation(view, waiter) without the GIL.
template <typename Operation>
void run(const char* what, const py::tuple& workspace, const Operation& operation) {
  if (workspace.size() != 7) {
    throw py::value_error("a workspace is (staging_ptrs, flag_ptrs, state, rank, group, timeout_s, site)");
  }
  const auto staging_ptrs = workspace[0].cast<T>();
  const auto flag_ptrs = workspace[1].cast<T>();
  const auto state = workspace[2].cast<T>();
  const auto rank = workspace[3].cast<int>();
  const auto is_table = [](const T& t, at::ScalarType dtype) {
    return t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype;
  };
  if (!is_table(flag_ptrs, at::kLong) || flag_ptrs.dim() != 2 || flag_ptrs.size(0) != 2 ||
      !is_table(staging_ptrs, at::kLong) || staging_ptrs.sizes() != flag_ptrs.sizes()) {
    throw py::value_error("staging_ptrs and flag_ptrs must be contiguous int64 CPU tensors [2, world_size]");
  }
  if (!is_table(state, at::kInt) || state.numel() != kStateWords) {
    throw py::value_error("state must be a contiguous int32 CPU tensor [" + std::to_string(kStateWords) + "]");
  }
  if (rank < 0 || rank >= flag_ptrs.size(1)) {
    throw py::value_error("rank " + std::to_string(rank) + " is not in the workspace's group");
  }
  const WorkspaceView view{
      staging_ptrs.const_data_ptr<int64_t>(),
      flag_ptrs.const_data_ptr<int64_t>(),
      state.mutable_data_ptr<int32_t>(),
      static_cast<int>(flag_ptrs.size(1)),
      workspace[6].cast<int32_t>()};
  Waiter waiter{what, workspace[4].cast<std::string>(), rank, workspace[5].cast<double>(), view.world_size};
  WithoutGil without_gil;
  operation(view, std::move(waiter));
}

bool is_average(const std::string& op) {
  if (op != "sum" && op != "avg") {
    throw py::value_error("the reduction is 'sum' or 'avg', not '" + op + "'");
  }
  return op == "avg";
}

py::tuple as_tuple(const Needs& needs) {
  return py::make_tuple(needs.staging_bytes, needs.flags);
}

} // namespace

WithoutGil::WithoutGil() : thread_state_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}

WithoutGil::~WithoutGil() {
  if (thread_state_ != nullptr) {
    PyEval_RestoreThread(static_cast<PyThreadState*>(thread_state_));
  }
}

void check_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) {
    throw py::error_already_set();
  }
}

double default_timeout_s() {
  if (from_python.timeout_s == nullptr) {
    throw Error("the host backend was loaded without symmpatterns.host_backend, which configures it");
  }
  const py::gil_scoped_acquire gil;
  return py::handle(from_python.timeout_s)().cast<double>();
}

} // namespace symmpatterns

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace symmpatterns;
  m.doc() = "Symmetric memory for CPU tensors, and the fused operators on it.";

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const Timeout& error) {
      PyErr_SetString(from_python.timeout, error.what());
    } catch (const Divergence& error) {
      PyErr_SetString(from_python.divergence, error.what());
    } catch (const Error& error) {
      PyErr_SetString(from_python.error, error.what());
    }
  });

  m.def("configure", &configure);
  m.def("register_allocator", [] { register_allocator(); });
  m.def("enter_scope", &enter_scope);
  m.def("exit_scope", &exit_scope);
  m.def("scope_depth", &scope_depth);
  m.def("segment_of", [](uintptr_t address) -> py::object {
    const auto found = allocation_of(reinterpret_cast<const void*>(address));
    if (!found) {
      return py::none();
    }
    return py::make_tuple(reinterpret_cast<uintptr_t>(found->first), found->second);
  });
  m.def("live_segments", &live_segments);
  m.def("mapped_bytes", &mapped_bytes);
  m.def("trim", &Segment::trim);

  m.def(
      "barrier_of",
      [](const c10::intrusive_ptr<c10d::symmetric_memory::SymmetricMemory>& memory, int channel, size_t timeout_ms,
         uint32_t token) {
        auto* host = dynamic_cast<HostSymmetricMemory*>(memory.get());
        if (host == nullptr) {
          throw Error("barrier: the memory belongs to another backend");
        }
        host->barrier(channel, timeout_ms, token);
      });

  m.def("reduction_needs", [](int64_t elements, int64_t item_bytes, int world_size) {
    return as_tuple(reduction_needs(elements, item_bytes, world_size));
  });
  m.def("gather_needs", [](int64_t elements, int64_t item_bytes, int world_size) {
    return as_tuple(gather_needs(elements, item_bytes, world_size));
  });
  m.def("barrier", [](const std::string& what, const py::tuple& workspace) {
    run(what.c_str(), workspace,
        [&](const WorkspaceView& view, Waiter waiter) { barrier(view, std::move(waiter)); });
  });
  // scales: (scale_a, scale_b); dtype: that of the product, before it is reduced
  m.def(
      "matmul_all_reduce",
      [](const T& a, const T& b, const Maybe& bias, const T& out, const std::string& op, const Scales& scales,
         at::ScalarType dtype, const py::tuple& workspace) {
        const bool average = is_average(op);
        run("matmul_all_reduce", workspace, [&](const WorkspaceView& view, Waiter waiter) {
          matmul_all_reduce({a, b, bias, scales.first, scales.second, dtype}, out, average, view, std::move(waiter));
        });
      });
  m.def(
      "matmul_reduce_scatter",
      [](const T& a, const T& b, const Maybe& bias, const T& out, int scatter_dim, const std::string& op,
         const Scales& scales, at::ScalarType dtype, const py::tuple& workspace) {
        const bool average = is_average(op);
        run("matmul_reduce_scatter", workspace, [&](const WorkspaceView& view, Waiter waiter) {
          matmul_reduce_scatter({a, b, bias, scales.first, scales.second, dtype}, out, scatter_dim, average, view,
                                std::move(waiter));
        });
      });
  m.def(
      "all_gather_matmul",
      [](const T& a_shard, const std::vector<T>& bs, const std::vector<Maybe>& biases, const std::vector<T>& outs,
         const Maybe& gathered, int gather_dim, const Maybe& scale_a, const std::vector<Maybe>& scale_bs,
         const py::tuple& workspace) {
        run("all_gather_matmul", workspace, [&](const WorkspaceView& view, Waiter waiter) {
          all_gather_matmul(a_shard, bs, biases, outs, gathered, gather_dim, scale_a, scale_bs, view, std::move(waiter));
        });
      });
  m.def("all_reduce", [](const T& x, const T& out, const std::string& op, const py::tuple& workspace) {
    const bool average = is_average(op);
    run("all_reduce", workspace,
        [&](const WorkspaceView& view, Waiter waiter) { all_reduce(x, out, average, view, std::move(waiter)); });
  });
  m.def("reduce_scatter", [](const T& x, const T& out, const std::string& op, const py::tuple& workspace) {
    const bool average = is_average(op);
    run("reduce_scatter", workspace,
        [&](const WorkspaceView& view, Waiter waiter) { reduce_scatter(x, out, average, view, std::move(waiter)); });
  });
  m.def("all_gather", [](const T& x, const T& out, const py::tuple& workspace) {
    run("all_gather", workspace,
        [&](const WorkspaceView& view, Waiter waiter) { all_gather(x, out, view, std::move(waiter)); });
  });
  m.def(
      "all_reduce_rms_norm",
      [](const T& x, const Maybe& residual, const Maybe& weight, const T& norm, const T& sum, double eps,
         const std::string& op, const py::tuple& workspace) {
        const bool average = is_average(op);
        run("all_reduce_rms_norm", workspace, [&](const WorkspaceView& view, Waiter waiter) {
          all_reduce_rms_norm(x, residual, weight, norm, sum, eps, average, view, std::move(waiter));
        });
      });
  m.def("inject_faults_for_tests", [](int faults) {
    if (std::getenv("SYMMPATTERNS_ALLOW_FAULTS") == nullptr) {
      throw Error("faults are injected only by tests, which set SYMMPATTERNS_ALLOW_FAULTS");
    }
    injected_faults = faults;
  });
}
