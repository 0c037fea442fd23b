// How the functions of step.h fail: a text, thrown and caught within the backend.
#pragma once

#include <stdio.h>
#include <string.h>

#include <exception>

#include "step.h"

namespace fused_sched {

struct Failure {
  char text[kErrorSize];
};

template <class... Arguments>
[[noreturn]] void fail(const char* format, Arguments... arguments) {
  Failure failure;
  snprintf(failure.text, sizeof failure.text, format, arguments...);
  throw failure;
}

// Runs the body of a function of step.h: a Failure becomes its text and a non-zero status.
template <class Body>
int report_failure(char* error, Body body) {
  try {
    body();
    return 0;
  } catch (const Failure& failure) {
    memcpy(error, failure.text, kErrorSize);
  } catch (const std::exception& exception) {
    snprintf(error, kErrorSize, "%s", exception.what());
  }
  return 1;
}

}  // namespace fused_sched
