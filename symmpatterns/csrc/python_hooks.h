// The three things that code waiting for other processes needs from Python; module.cpp implements them, so that the
// rest compiles without Python's headers.
#pragma once

namespace symmpatterns {

// Gives up the GIL, if this thread holds it, for the lifetime of the object.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  void* thread_state_;
};

// Runs pending Python signal handlers; throws what they raise (KeyboardInterrupt, for example).
void check_signals();

// The limit of waits whose caller named none.
double default_timeout_s();

} // namespace symmpatterns
