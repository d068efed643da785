// The operator's table, and what the plugin classes of all TensorRT versions do with it.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../vkvx.h"
#include "logger.h"

namespace vkvx {

inline constexpr const char* kName = "VisualKVAttention";
inline constexpr const char* kVersion = "1";
inline constexpr const char* kNamespaces[] = {"", "vkvx"};  // parsers look in the one or the other

inline constexpr int kInputs = 14, kMetricInputs = 3, kOutputs = 7;
// The input whose memory an output shares; -1 for none.
inline constexpr int kAliases[kOutputs] = {-1, 6, 7, 8, 9, 11, 12};

// What was asked for cannot be done; the text names what was given and what was expected.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
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
  float softcap = 0.0f;
  int32_t sliding_window = 0;

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
    visit("softcap", self.softcap);
    visit("sliding_window", self.sliding_window);
  }

  bool packed() const { return key_bits != 16; }
  int inputs() const { return packed() && quantizer == "shaped" ? kInputs + kMetricInputs : kInputs; }
};

// A node: its attributes, checked, and the workspace that TensorRT was asked for. Copies share the latter: TensorRT asks one
// object for the size, writes another into the engine and runs a third.
class Operator {
 public:
  // Throws Error for a field that the table does not have, of another type, or with a value that is not supported.
  Operator(const char* layer, const nvinfer1::PluginFieldCollection* fields);

  const Attributes& attributes() const { return attributes_; }
  const std::string& layer() const { return layer_; }

  // What creates an equal object: the fields of the table and the workspace. They point into this object.
  std::vector<nvinfer1::PluginField> fields();

  // Throws Error unless a node with these attributes has this many.
  void check_counts(int inputs, int outputs) const;
  // Whether tensor `position`, inputs first, may have this type and format where the first input has the type `model`.
  bool supports(int position, nvinfer1::DataType type, nvinfer1::TensorFormat format, nvinfer1::DataType model) const;
  // Of an output, where the first input has the type `model`.
  static nvinfer1::DataType output_type(int output, nvinfer1::DataType model);
  // Bytes that suffice for these shapes of the inputs and all smaller ones, on any device. Throws Error for shapes that no call has.
  size_t workspace(const std::vector<nvinfer1::Dims>& shapes, nvinfer1::DataType model) const;
  // Launches one call: attention, then append. Throws Error.
  void run(const nvinfer1::PluginTensorDesc* input_descs, const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) const;

 private:
  std::string layer_;
  Attributes attributes_;
  std::shared_ptr<std::atomic<int32_t>> asked_;  // KiB of workspace, the most that was asked for
  int32_t asked_field_ = 0;                      // of fields()
  std::string model_;                            // the type of the model; empty: that of the first input
};

// Fields of the table with their defaults, which live as long as the library. `chooses`: TensorRT chooses between FP16 and FP32 for
// each layer; then a field more, model_dtype, keeps the node in the type of the graph.
const nvinfer1::PluginFieldCollection* table_fields(bool chooses);

// Runs the body; an exception is logged and `failure` returned, since none may leave a plugin.
template <class Result, class Body>
Result guarded(const std::string& layer, Result failure, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    log_error((layer.empty() ? kName : kName + (" '" + layer + "'")) + ": " + error.what());
  } catch (...) {
    log_error(kName + std::string(": unknown error"));
  }
  return failure;
}

}  // namespace vkvx
