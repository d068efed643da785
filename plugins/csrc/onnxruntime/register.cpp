// What onnxruntime calls when the library is registered with the options of a session.
#include <cstdio>
#include <mutex>
#include <string>

#include "../node.h"
#include "operator.h"

namespace vkvx::ort {

namespace {

constexpr const char* kDomain = "vkvx";

bool is_supported(const char* version) {
  unsigned major = 0, minor = 0;
  return std::sscanf(version, "%u.%u", &major, &minor) == 2 &&
         (major > 1 || (major == 1 && minor >= kMinor));
}

// Sessions keep pointers to it, so it is never released; one serves all.
Domain* domain(const Api* api) {
  static std::mutex mutex;
  static Domain* made = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (made == nullptr) {
    Domain* fresh;
    check(api, CreateCustomOpDomain(api, kDomain, &fresh));
    for (const CustomOp* op : custom_ops(api)) check(api, CustomOpDomain_Add(api, fresh, op));
    made = fresh;
  }
  return made;
}

}  // namespace

}  // namespace vkvx::ort

extern "C" vkvx::ort::Status* RegisterCustomOps(vkvx::ort::SessionOptions* options,
                                                const vkvx::ort::ApiBase* base) {
  using namespace vkvx::ort;
  const char* version = base->version();
  const Api* api = base->get_api(is_supported(version) ? kMinor : 1);
  try {
    if (!is_supported(version))
      throw vkvx::Error("needs onnxruntime 1." + std::to_string(kMinor) +
                        " or newer, but this is " + version);
    check(api, AddCustomOpDomain(api, options, domain(api)));
    return nullptr;
  } catch (const std::exception& error) {
    return CreateStatus(api, kFail, (std::string("libvkvx_onnxruntime: ") + error.what()).c_str());
  }
}
