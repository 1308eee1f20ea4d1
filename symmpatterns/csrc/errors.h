// What can go wrong, as C++ exceptions; module.cpp turns each into the Python class of the same meaning.
#pragma once

#include <stdexcept>
#include <string>

namespace symmpatterns {

// Symmetric memory could not be set up or used.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A peer did not arrive in time, or its process has ended.
struct Timeout : Error {
  using Error::Error;
};

// The ranks of a group did different things at the same point of the program.
struct Divergence : Error {
  using Error::Error;
};

} // namespace symmpatterns
