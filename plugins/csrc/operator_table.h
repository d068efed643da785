// The operator's table in C++, written by `python -m vkvx.plugins.generate`.
// clang-format off
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "vkvx.h"

namespace vkvx {

inline constexpr const char* kName = "VisualKVAttention";
inline constexpr const char* kVersion = "1";
inline constexpr int kTile = 128;  // visual tokens
inline constexpr int kLloydIterations = 8;
inline constexpr float kShapedStep[] = {0.0f, 2.3f, 1.0f, 0.0f, 0.33f, 0.0f, 0.0f, 0.0f, 1.0f};  // by bits
inline constexpr float kShapedFlatStep = 1.6f, kShapedStepSlope = 5.0f;  // at 1 bit

// Names in the order of their numbers in vkvx.h.
inline constexpr const char* kDtypeNames[] = {"float16", "bfloat16", "float32"};
inline constexpr const char* kQuantizerNames[] = {"minmax", "quantile", "shrink", "lloyd", "shaped"};
inline constexpr const char* kCorrectionNames[] = {"none", "affine", "expected"};
inline constexpr const char* kVisualMaskNames[] = {"causal", "run", "prefix"};
inline constexpr const char* kKernelNames[] = {"auto", "plain", "codes", "planes", "prefill", "few"};
inline constexpr bool kNeedsMetrics[] = {false, false, false, false, true};  // by quantiser

// A field of VkvxParams that holds one of `count` numbers, and the names of these in C.
struct Numbered {
  const char* name;
  int32_t VkvxParams::*field;
  int count;
  const char* constants;
};
inline constexpr Numbered kNumbered[] = {
    {"dtype", &VkvxParams::dtype, 3, "VKVX_FLOAT16, VKVX_BFLOAT16 or VKVX_FLOAT32"},
    {"quantizer", &VkvxParams::quantizer, 5, "VKVX_MINMAX, VKVX_QUANTILE, VKVX_SHRINK, VKVX_LLOYD or VKVX_SHAPED"},
    {"correction", &VkvxParams::correction, 3, "VKVX_CORRECTION_NONE, VKVX_CORRECTION_AFFINE or VKVX_CORRECTION_EXPECTED"},
    {"visual_mask", &VkvxParams::visual_mask, 3, "VKVX_MASK_CAUSAL, VKVX_MASK_RUN or VKVX_MASK_PREFIX"},
    {"kernel", &VkvxParams::kernel, 6, "VKVX_AUTO, VKVX_PLAIN, VKVX_CODES, VKVX_PLANES, VKVX_PREFILL or VKVX_FEW"},
};

inline constexpr int kInputs = 14, kMetricInputs = 3, kWindowInputs = 1;
inline constexpr int kOutputs = 7;
// The input whose memory an output shares; -1 for none.
inline constexpr int kAliases[kOutputs] = {-1, 6, 7, 8, 9, 11, 12};

// Sizes of docs/operator.md: kC128 is C/128, kD32 is D/32, kD41 is D/4+1.
// In a shape, numbers above 0 stand for themselves.
inline constexpr int kSymbols = 15;
enum Symbol { kB = -kSymbols, kHq, kS, kD, kHkv, kNv, kNt, kBc, kC128, kBk, kD32, kG, kBv, kN, kD41 };
inline constexpr const char* kSymbolNames[] = {"B", "Hq", "S", "D", "Hkv", "Nv", "Nt", "Bc", "C/128", "bk", "D/32", "G", "bv", "N", "D/4+1"};

enum class Type { kModel, kInt32, kFloat16, kFloat32 };

// An input; `field` is where its address lies in VkvxParams.
struct Tensor {
  const char* name;
  Type type;
  int rank;
  int shape[6];
  size_t field;
};
inline constexpr Tensor kTable[kInputs + kMetricInputs + kWindowInputs] = {
    {"query", Type::kModel, 4, {kB, kHq, kS, kD}, offsetof(VkvxParams, query)},
    {"key", Type::kModel, 4, {kB, kHkv, kS, kD}, offsetof(VkvxParams, key)},
    {"value", Type::kModel, 4, {kB, kHkv, kS, kD}, offsetof(VkvxParams, value)},
    {"visual_index", Type::kInt32, 2, {kB, kNv}, offsetof(VkvxParams, visual_index)},
    {"text_index", Type::kInt32, 2, {kB, kNt}, offsetof(VkvxParams, text_index)},
    {"slot", Type::kInt32, 1, {kB}, offsetof(VkvxParams, slot)},
    {"visual_key", Type::kInt32, 6, {kBc, kHkv, kC128, kBk, 128, kD32}, offsetof(VkvxParams, visual_key)},
    {"visual_key_params", Type::kFloat16, 5, {kBc, kHkv, kG, 3, kD}, offsetof(VkvxParams, visual_key_params)},
    {"visual_value", Type::kInt32, 6, {kBc, kHkv, kC128, kBv, kD, 4}, offsetof(VkvxParams, visual_value)},
    {"visual_value_params", Type::kFloat16, 5, {kBc, kHkv, kG, 2, kD}, offsetof(VkvxParams, visual_value_params)},
    {"visual_count", Type::kInt32, 2, {kBc, kG}, offsetof(VkvxParams, visual_count)},
    {"text_key", Type::kModel, 4, {kBc, kHkv, kN, kD}, offsetof(VkvxParams, text_key)},
    {"text_value", Type::kModel, 4, {kBc, kHkv, kN, kD}, offsetof(VkvxParams, text_value)},
    {"text_count", Type::kInt32, 1, {kBc}, offsetof(VkvxParams, text_count)},
    {"key_metric", Type::kFloat16, 3, {kHkv, kD, kD}, offsetof(VkvxParams, key_metric)},
    {"value_metric", Type::kFloat16, 3, {kHkv, kD, kD}, offsetof(VkvxParams, value_metric)},
    {"rotation", Type::kFloat32, 3, {kB, 2, kD}, offsetof(VkvxParams, rotation)},
    {"window_start", Type::kInt32, 3, {kB, 2, kS}, offsetof(VkvxParams, window_start)},
};
// With text rows of 8 bits, in place of the inputs kTextRows.
inline constexpr int kTextRows[] = {11, 12};
inline constexpr Tensor kTextRows8[] = {
    {"text_key", Type::kInt32, 4, {kBc, kHkv, kN, kD41}, offsetof(VkvxParams, text_key)},
    {"text_value", Type::kInt32, 4, {kBc, kHkv, kN, kD41}, offsetof(VkvxParams, text_value)},
};

// A field that is a size: that of a symbol, times the field `unit` if there is one.
struct Size {
  const char* name;
  int32_t VkvxParams::*field;
  Symbol symbol;
  int32_t VkvxParams::*unit;
};
inline constexpr Size kSizes[] = {
    {"rows", &VkvxParams::rows, kB, nullptr},
    {"positions", &VkvxParams::positions, kS, nullptr},
    {"slots", &VkvxParams::slots, kBc, nullptr},
    {"query_heads", &VkvxParams::query_heads, kHq, nullptr},
    {"kv_heads", &VkvxParams::kv_heads, kHkv, nullptr},
    {"head_dim", &VkvxParams::head_dim, kD, nullptr},
    {"visual_capacity", &VkvxParams::visual_capacity, kG, &VkvxParams::group_size},
    {"text_capacity", &VkvxParams::text_capacity, kN, nullptr},
    {"visual_entries", &VkvxParams::visual_entries, kNv, nullptr},
    {"text_entries", &VkvxParams::text_entries, kNt, nullptr},
};

// Attributes of a node, with the defaults of the table.
struct Attributes {
  int32_t key_bits = 1;
  int32_t value_bits = 1;
  int32_t group_size = 128;
  std::string quantizer = "lloyd";
  float quantile_alpha_key = 0.2f;
  float quantile_alpha_value = 0.2f;
  float shrink_key = 0.5f;
  float shrink_value = 0.3f;
  std::string score_correction = "expected";
  float tau = 3.0f;
  float correction_limit = 3.0f;
  float scale = 1.0f;
  int32_t rotary_dim = 0;
  int32_t rotary_interleaved = 0;
  float softcap = 0.0f;
  int32_t sliding_window = 0;
  std::string visual_mask = "causal";
  int32_t text_bits = 16;

  // Calls visit(name, member) for each, in the order of the table.
  template <class Self, class Visit>
  static void visit(Self& self, Visit&& visit) {
    visit("key_bits", self.key_bits);
    visit("value_bits", self.value_bits);
    visit("group_size", self.group_size);
    visit("quantizer", self.quantizer);
    visit("quantile_alpha_key", self.quantile_alpha_key);
    visit("quantile_alpha_value", self.quantile_alpha_value);
    visit("shrink_key", self.shrink_key);
    visit("shrink_value", self.shrink_value);
    visit("score_correction", self.score_correction);
    visit("tau", self.tau);
    visit("correction_limit", self.correction_limit);
    visit("scale", self.scale);
    visit("rotary_dim", self.rotary_dim);
    visit("rotary_interleaved", self.rotary_interleaved);
    visit("softcap", self.softcap);
    visit("sliding_window", self.sliding_window);
    visit("visual_mask", self.visual_mask);
    visit("text_bits", self.text_bits);
  }

  // What is wrong with the first attribute that is out of its range; empty if none is.
  std::string out_of_range() const {
    if (!(quantile_alpha_key >= 0.0f && quantile_alpha_key < 0.5f)) return "quantile_alpha_key is " + std::to_string(quantile_alpha_key) + "; give at least 0 and less than 0.5";
    if (!(quantile_alpha_value >= 0.0f && quantile_alpha_value < 0.5f)) return "quantile_alpha_value is " + std::to_string(quantile_alpha_value) + "; give at least 0 and less than 0.5";
    if (!(shrink_key > 0.0f && shrink_key <= 1.0f)) return "shrink_key is " + std::to_string(shrink_key) + "; give more than 0 and at most 1";
    if (!(shrink_value > 0.0f && shrink_value <= 1.0f)) return "shrink_value is " + std::to_string(shrink_value) + "; give more than 0 and at most 1";
    if (!(tau >= 0.0f)) return "tau is " + std::to_string(tau) + "; give at least 0";
    if (!(correction_limit > 0.0f)) return "correction_limit is " + std::to_string(correction_limit) + "; give more than 0";
    if (!(rotary_dim >= 0.0f)) return "rotary_dim is " + std::to_string(rotary_dim) + "; give at least 0";
    if (!(rotary_interleaved >= 0.0f && rotary_interleaved <= 1.0f)) return "rotary_interleaved is " + std::to_string(rotary_interleaved) + "; give at least 0 and at most 1";
    if (!(softcap >= 0.0f)) return "softcap is " + std::to_string(softcap) + "; give at least 0";
    if (!(sliding_window >= 0.0f)) return "sliding_window is " + std::to_string(sliding_window) + "; give at least 0";
    return {};
  }
};

// What the attributes fill. number_of(name of the attribute, its value, names) gives the number of a name.
template <class NumberOf>
VkvxParams params_of(const Attributes& a, NumberOf&& number_of) {
  VkvxParams p{};
  p.size = sizeof(VkvxParams);
  p.group_size = a.group_size;
  p.key_bits = a.key_bits;
  p.value_bits = a.value_bits;
  p.quantizer = number_of("quantizer", a.quantizer, kQuantizerNames);
  p.correction = number_of("score_correction", a.score_correction, kCorrectionNames);
  p.rotary_dim = a.rotary_dim;
  p.rotary_interleaved = a.rotary_interleaved;
  p.sliding_window = a.sliding_window;
  p.visual_mask = number_of("visual_mask", a.visual_mask, kVisualMaskNames);
  p.text_bits = a.text_bits;
  p.quantile_alpha_key = a.quantile_alpha_key;
  p.quantile_alpha_value = a.quantile_alpha_value;
  p.shrink_key = a.shrink_key;
  p.shrink_value = a.shrink_value;
  p.tau = a.tau;
  p.correction_limit = a.correction_limit;
  p.scale = a.scale;
  p.softcap = a.softcap;
  return p;
}

}  // namespace vkvx
