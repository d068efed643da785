#include "logger.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <mutex>
#include <typeinfo>

#if defined(TRT_MAJOR_RTX) || NV_TENSORRT_MAJOR >= 10
#define VKVX_MAY_BE_VERSIONED 1
#endif

namespace vkvx {

using Severity = nvinfer1::ILogger::Severity;

// ILoggerFinder and ILogger as they lie in memory in TensorRT 8 to 10. Not in an unnamed namespace:
// the compiler would conclude that no object is of these types.
struct PlainLogger {
  virtual void log(Severity severity, const char* text) noexcept = 0;
};
struct PlainFinder {
  virtual PlainLogger* findLogger() = 0;
};

#if VKVX_MAY_BE_VERSIONED
// As they lie in TensorRT 11 and TensorRT for RTX, where both derive from IVersionedInterface.
struct VersionedLogger : nvinfer1::IVersionedInterface {
  virtual void log(Severity severity, const char* text) noexcept = 0;
};
struct VersionedFinder : nvinfer1::IVersionedInterface {
  virtual VersionedLogger* findLogger() = 0;
};
#endif

namespace {

std::mutex mutex;
void* finder = nullptr;

// The logger of the TensorRT library that the finder lives in: outside of engines a finder knows
// none.
void* global_logger() {
  Dl_info library;
  if (dladdr(*static_cast<void**>(finder), &library) == 0) return nullptr;
  void* handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return nullptr;
  auto* get = reinterpret_cast<void* (*)()>(dlsym(handle, "getLogger"));
  void* logger = get == nullptr ? nullptr : get();
  dlclose(handle);
  return logger;
}

template <class Finder, class Logger>
bool log_with(const std::string& text) {
  Logger* logger = static_cast<Finder*>(finder)->findLogger();
  if (logger == nullptr) logger = static_cast<Logger*>(global_logger());
  if (logger != nullptr) logger->log(Severity::kERROR, text.c_str());
  return logger != nullptr;
}

#if VKVX_MAY_BE_VERSIONED
// Whether TensorRT's finder derives from IVersionedInterface, by its own type information, which
// lies before its virtual functions.
bool is_versioned() {
  const std::type_info* type = (*static_cast<const std::type_info* const* const*>(finder))[-1];
  while (type != nullptr && *type != typeid(nvinfer1::IVersionedInterface)) {
    const auto* derived = dynamic_cast<const abi::__si_class_type_info*>(type);
    type = derived == nullptr ? nullptr : derived->__base_type;
  }
  return type != nullptr;
}
#endif

bool log_with_finder(const std::string& text) {
  if (finder == nullptr) return false;
#if VKVX_MAY_BE_VERSIONED
  if (is_versioned()) return log_with<VersionedFinder, VersionedLogger>(text);
#endif
  return log_with<PlainFinder, PlainLogger>(text);
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* given) {
  const std::lock_guard<std::mutex> lock(mutex);
  finder = given;
}

void log_error(const std::string& text) noexcept {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!log_with_finder(text)) std::fprintf(stderr, "%s\n", text.c_str());
}

}  // namespace vkvx
