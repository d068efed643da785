// The C interface: checks what it is given, then launches.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include "internal.h"

namespace vkvx {

namespace {

thread_local std::string message;

bool is_code_width(int bits) { return bits == 1 || bits == 2 || bits == 4 || bits == 8; }

int check(const VkvxParams* given) {
  if (given == nullptr || given->size != static_cast<int32_t>(sizeof(VkvxParams)))
    return fail(
        VKVX_BAD_ARGUMENT,
        "params has another size than this library's VkvxParams; compare vkvx_abi_version()");
  const VkvxParams& p = *given;
  const auto bad = [](const std::string& what, int64_t value, const std::string& expected) {
    return fail(VKVX_BAD_ARGUMENT, what + " is " + std::to_string(value) + "; give " + expected);
  };
  for (const Numbered& field : kNumbered)
    if (p.*field.field < 0 || p.*field.field >= field.count)
      return bad(field.name, p.*field.field, field.constants);
  if (p.rows < 0 || p.rows > 65535) return bad("rows", p.rows, "0 to 65535");
  if (p.positions < 0) return bad("positions", p.positions, "at least 0");
  if (p.slots < p.rows && p.rows > 0 && p.slots < 1) return bad("slots", p.slots, "at least 1");
  if (p.kv_heads < 1 || p.kv_heads > 65535) return bad("kv_heads", p.kv_heads, "1 to 65535");
  if (p.query_heads < 1 || p.query_heads % p.kv_heads || p.query_heads > 65535)
    return bad("query_heads", p.query_heads, "a multiple of kv_heads");
  if (p.head_dim < 32 || p.head_dim > VKVX_MAX_HEAD_DIM || p.head_dim % 32)
    return bad("head_dim", p.head_dim,
               "a multiple of 32 up to " + std::to_string(VKVX_MAX_HEAD_DIM));
  const bool baseline = p.key_bits == 16 && p.value_bits == 16;
  if (!baseline && !is_code_width(p.key_bits))
    return bad("key_bits", p.key_bits, "1, 2, 4 or 8, or 16 for keys and values");
  if (!baseline && !is_code_width(p.value_bits))
    return bad("value_bits", p.value_bits, "1, 2, 4 or 8, or 16 for keys and values");
  if (p.text_bits != 16 && (p.text_bits != 8 || baseline))
    return bad("text_bits", p.text_bits, baseline ? "16 where key_bits is" : "16 or 8");
  if (p.group_size < kTile || p.group_size % kTile)
    return bad("group_size", p.group_size, "a positive multiple of " + std::to_string(kTile));
  if (p.visual_capacity < 0 || p.visual_capacity % p.group_size || (baseline && p.visual_capacity))
    return bad("visual_capacity", p.visual_capacity,
               baseline ? "0 at 16 bits" : "a multiple of group_size");
  if (p.visual_entries < 0 || (!baseline && p.visual_entries % p.group_size))
    return bad("visual_entries", p.visual_entries, "a multiple of group_size");
  if (p.text_capacity < 0) return bad("text_capacity", p.text_capacity, "at least 0");
  if (p.text_entries < 0) return bad("text_entries", p.text_entries, "at least 0");
  if (p.rotary_dim < 0 || p.rotary_dim > p.head_dim || p.rotary_dim % 2)
    return bad("rotary_dim", p.rotary_dim, "an even number up to head_dim");
  if (p.rotary_interleaved != 0 && p.rotary_interleaved != 1)
    return bad("rotary_interleaved", p.rotary_interleaved, "0 or 1");
  if (!(p.tau >= 0.0f) || !(p.correction_limit > 0.0f))
    return fail(VKVX_BAD_ARGUMENT, "tau must be at least 0 and correction_limit more than 0");
  if (!std::isfinite(p.scale)) return fail(VKVX_BAD_ARGUMENT, "scale must be finite");
  if (!(p.softcap >= 0.0f) || !std::isfinite(p.softcap))
    return fail(VKVX_BAD_ARGUMENT, "softcap must be at least 0 and finite");
  if (p.sliding_window < 0) return bad("sliding_window", p.sliding_window, "at least 0");
  if (p.sliding_window && p.correction == VKVX_CORRECTION_AFFINE)
    return fail(VKVX_UNSUPPORTED,
                "VKVX_CORRECTION_AFFINE takes no sliding_window; give another correction");
  if (p.splits < 0) return bad("splits", p.splits, "0 to choose, or the number of parts");
  return VKVX_OK;
}

int check_call(const VkvxParams& p, size_t needed) {
  const std::pair<const void*, const char*> pointers[] = {
      {p.query, "query"},           {p.key, "key"},
      {p.value, "value"},           {p.slot, "slot"},
      {p.text_key, "text_key"},     {p.text_value, "text_value"},
      {p.text_count, "text_count"}, {p.output, "output"}};
  for (const auto& [pointer, name] : pointers)
    if (pointer == nullptr)
      return fail(VKVX_BAD_ARGUMENT, std::string(name) + " is a null pointer");
  if (p.visual_capacity && (!p.visual_key || !p.visual_key_params || !p.visual_value ||
                            !p.visual_value_params || !p.visual_count))
    return fail(VKVX_BAD_ARGUMENT, "a tensor of the visual cache is a null pointer");
  if ((p.visual_entries && !p.visual_index) || (p.text_entries && !p.text_index))
    return fail(VKVX_BAD_ARGUMENT, "an index is a null pointer");
  if (kNeedsMetrics[p.quantizer] && p.key_bits != 16 && p.visual_entries &&
      (!p.key_metric || !p.value_metric || !p.rotation))
    return fail(VKVX_BAD_ARGUMENT,
                "key_metric, value_metric or rotation is a null pointer; this quantizer needs them "
                "for calls with visual entries");
  if (p.sliding_window && !p.window_start)
    return fail(VKVX_BAD_ARGUMENT, "window_start is a null pointer; a sliding window needs it");
  if (p.workspace_bytes < needed || p.workspace == nullptr)
    return fail(VKVX_WORKSPACE_TOO_SMALL, "the workspace has " + std::to_string(p.workspace_bytes) +
                                              " bytes; this call needs " + std::to_string(needed));
  return VKVX_OK;
}

int check_sample(const VkvxSampleParams* given) {
  if (given == nullptr || given->size != static_cast<int32_t>(sizeof(VkvxSampleParams)))
    return fail(VKVX_BAD_ARGUMENT,
                "params has another size than this library's VkvxSampleParams; compare "
                "vkvx_abi_version()");
  const VkvxSampleParams& p = *given;
  const auto bad = [](const std::string& what, int64_t value, const std::string& expected) {
    return fail(VKVX_BAD_ARGUMENT, what + " is " + std::to_string(value) + "; give " + expected);
  };
  if (p.dtype < VKVX_FLOAT16 || p.dtype > VKVX_FLOAT32)
    return bad("dtype", p.dtype, "VKVX_FLOAT16, VKVX_BFLOAT16 or VKVX_FLOAT32");
  if (p.rows < 0) return bad("rows", p.rows, "at least 0");
  if (p.vocab < 1 || p.vocab > VKVX_MAX_VOCAB)
    return bad("vocab", p.vocab, "1 to " + std::to_string(VKVX_MAX_VOCAB));
  if (p.logits_stride < p.vocab) return bad("logits_stride", p.logits_stride, "at least vocab");
  const std::pair<const void*, const char*> pointers[] = {{p.logits, "logits"},
                                                          {p.options, "options"},
                                                          {p.slot, "slot"},
                                                          {p.seen, "seen"},
                                                          {p.token, "token"}};
  for (const auto& [pointer, name] : pointers)
    if (pointer == nullptr)
      return fail(VKVX_BAD_ARGUMENT, std::string(name) + " is a null pointer");
  return VKVX_OK;
}

// The kernel that a call runs, or -1 with a message.
int attention_kernel(const VkvxParams& p, const Device& device) {
  if (p.kernel == VKVX_AUTO) return choose_kernel(p, device);
  if (p.kernel == VKVX_PLAIN) return VKVX_PLAIN;
  if (p.kernel == VKVX_PREFILL && prefill_takes(p, device)) return VKVX_PREFILL;
  if ((p.kernel == VKVX_CODES || p.kernel == VKVX_PLANES) && decode_takes(p, device, p.kernel))
    return p.kernel;
  if (p.kernel == VKVX_FEW && few_takes(p, device)) return VKVX_FEW;
  fail(VKVX_UNSUPPORTED,
       "the kernel that was asked for does not take these sizes, bits or types on this device; "
       "give VKVX_AUTO");
  return -1;
}

size_t attention_workspace(const VkvxParams& p, const Device& device, int kernel) {
  return kernel == VKVX_CODES || kernel == VKVX_PLANES ? decode_workspace(p, device, kernel)
                                                       : plain_workspace(p);
}

}  // namespace

int fail(int code, const std::string& text) {
  message = text;
  return code;
}

int check_cuda(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return VKVX_OK;
  return fail(VKVX_CUDA_ERROR, std::string(what) + ": " + cudaGetErrorString(error));
}

const Device& current_device() {
  static std::mutex mutex;
  static std::vector<Device> devices(64, Device{-1, 0, 0, 0});
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index < 0 || index >= 64) index = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices[index];
  if (device.index < 0) {
    int major = 0, minor = 0, processors = 0, shared = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess &&
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) ==
            cudaSuccess)
      device = Device{index, std::min(processors, kMostProcessors), 10 * major + minor, shared};
    cudaGetLastError();
  }
  return device;
}

// Attends and, with `appends`, appends: in one launch where a decode kernel takes a call that
// brings text alone.
int attend(const VkvxParams* params, bool appends, void* stream) {
  if (const int code = check(params)) return code;
  const VkvxParams& p = *params;
  const Device& device = current_device();
  if (device.index < 0) return fail(VKVX_CUDA_ERROR, "no CUDA device is current");
  const int kernel = attention_kernel(p, device);
  if (kernel < 0) return VKVX_UNSUPPORTED;
  if (p.rows == 0 || p.positions == 0) return VKVX_OK;
  const size_t needed = attention_workspace(p, device, kernel);
  if (const int code = check_call(p, appends ? std::max(needed, append_workspace(p)) : needed))
    return code;
  const auto on = static_cast<cudaStream_t>(stream);
  if (kernel == VKVX_CODES || kernel == VKVX_PLANES) {
    const bool at_once = appends && p.visual_entries == 0;
    const int code = decode(p, device, kernel, at_once, on);
    return code == VKVX_OK && appends && !at_once ? append(p, device, on) : code;
  }
  if (kernel == VKVX_FEW) return few(p, device, appends, on);
  const int code = kernel == VKVX_PLAIN ? plain(p, on) : prefill(p, on);
  return code == VKVX_OK && appends ? append(p, device, on) : code;
}

}  // namespace vkvx

extern "C" {

int vkvx_abi_version(void) { return VKVX_ABI_VERSION; }

const char* vkvx_last_error(void) { return vkvx::message.c_str(); }

int vkvx_workspace_bytes(const VkvxParams* params, size_t* bytes) {
  if (const int code = vkvx::check(params)) return code;
  if (bytes == nullptr) return vkvx::fail(VKVX_BAD_ARGUMENT, "bytes is a null pointer");
  const vkvx::Device& device = vkvx::current_device();
  if (device.index < 0) return vkvx_workspace_bound(params, bytes);
  const int kernel = vkvx::attention_kernel(*params, device);
  if (kernel < 0) return VKVX_UNSUPPORTED;
  *bytes =
      std::max(vkvx::attention_workspace(*params, device, kernel), vkvx::append_workspace(*params));
  return VKVX_OK;
}

int vkvx_workspace_bound(const VkvxParams* params, size_t* bytes) {
  if (const int code = vkvx::check(params)) return code;
  if (bytes == nullptr) return vkvx::fail(VKVX_BAD_ARGUMENT, "bytes is a null pointer");
  if (params->kernel != VKVX_AUTO || params->splits)
    return vkvx::fail(
        VKVX_UNSUPPORTED,
        "the workspace of any device is known for kernel VKVX_AUTO and 0 splits only");
  *bytes = vkvx::bound_of_workspace(*params);
  return VKVX_OK;
}

int vkvx_workspace_zeroed(const VkvxParams* params, size_t* bytes) {
  if (const int code = vkvx::check(params)) return code;
  if (bytes == nullptr) return vkvx::fail(VKVX_BAD_ARGUMENT, "bytes is a null pointer");
  const vkvx::Device& device = vkvx::current_device();
  if (device.index < 0) return vkvx::fail(VKVX_CUDA_ERROR, "no CUDA device is current");
  const int kernel = vkvx::attention_kernel(*params, device);
  if (kernel < 0) return VKVX_UNSUPPORTED;
  *bytes = kernel == VKVX_CODES || kernel == VKVX_PLANES
               ? vkvx::decode_zeroed(*params, device, kernel)
               : 0;
  return VKVX_OK;
}

int vkvx_attention(const VkvxParams* params, void* stream) {
  return vkvx::attend(params, false, stream);
}

int vkvx_append(const VkvxParams* params, void* stream) {
  if (const int code = vkvx::check(params)) return code;
  const vkvx::Device& device = vkvx::current_device();
  if (device.index < 0) return vkvx::fail(VKVX_CUDA_ERROR, "no CUDA device is current");
  if (params->rows == 0 || params->positions == 0) return VKVX_OK;
  if (const int code = vkvx::check_call(*params, vkvx::append_workspace(*params))) return code;
  return vkvx::append(*params, device, static_cast<cudaStream_t>(stream));
}

int vkvx_step(const VkvxParams* params, void* stream) { return vkvx::attend(params, true, stream); }

int vkvx_sample(const VkvxSampleParams* params, void* stream) {
  if (const int code = vkvx::check_sample(params)) return code;
  if (vkvx::current_device().index < 0)
    return vkvx::fail(VKVX_CUDA_ERROR, "no CUDA device is current");
  return params->rows ? vkvx::sample(*params, static_cast<cudaStream_t>(stream)) : VKVX_OK;
}

int vkvx_last_tokens(int32_t rows, const int32_t* slot, const int32_t* last_token,
                     int32_t* input_ids, void* stream) {
  if (rows < 0)
    return vkvx::fail(VKVX_BAD_ARGUMENT, "rows is " + std::to_string(rows) + "; give at least 0");
  if (slot == nullptr || last_token == nullptr || input_ids == nullptr)
    return vkvx::fail(VKVX_BAD_ARGUMENT, "slot, last_token or input_ids is a null pointer");
  if (vkvx::current_device().index < 0)
    return vkvx::fail(VKVX_CUDA_ERROR, "no CUDA device is current");
  if (rows == 0) return VKVX_OK;
  return vkvx::last_tokens(rows, slot, last_token, input_ids, static_cast<cudaStream_t>(stream));
}
}
