// Errors inside the library are exceptions; at the ABI they become a status, never anything else.
#pragma once

#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

#include "abi.h"

namespace onnxcomp {

// A node or a tensor that the operator cannot serve. The message names the values.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Joins values into one message and throws it.
template <class... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// Turns a status of the runtime into an exception.
inline void Check(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

// Runs `body` and turns whatever it throws into a status, with `where` in front of the message.
template <class Body>
OrtStatus* Guard(const Api& api, const std::string& where, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    try {
      return api.CreateStatus(kInvalidArgument, (where + ": " + error.what()).c_str());
    } catch (...) {
      return api.CreateStatus(kInvalidArgument, error.what());
    }
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(kFail, "onnxcomp: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(kFail, error.what());
  } catch (...) {
    return api.CreateStatus(kFail, "onnxcomp: unknown error");
  }
}

}  // namespace onnxcomp
