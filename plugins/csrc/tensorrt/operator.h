// What the plugin classes of all TensorRT versions do with the operator's table.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../node.h"
#include "logger.h"

namespace vkvx {

inline constexpr const char* kNamespaces[] = {"", "vkvx"};  // parsers look in the one or the other

// A node: its attributes, checked, and the workspace that TensorRT was asked for. Copies share the
// latter: TensorRT asks one object for the size, writes another into the engine and runs a third.
class Operator {
 public:
  // Throws Error for a field that the table does not have, of another type, or with a value that is
  // not supported.
  Operator(const char* layer, const nvinfer1::PluginFieldCollection* fields);

  const Attributes& attributes() const { return attributes_; }
  const std::string& layer() const { return layer_; }

  // What creates an equal object: the fields of the table and the workspace. They point into this
  // object.
  std::vector<nvinfer1::PluginField> fields();

  // Throws Error unless a node with these attributes has this many.
  void check_counts(int inputs, int outputs) const;
  // Whether tensor `position`, inputs first, may have this type and format where the first input
  // has the type `model`.
  bool supports(int position, nvinfer1::DataType type, nvinfer1::TensorFormat format,
                nvinfer1::DataType model) const;
  // Of an output, where the first input has the type `model`.
  nvinfer1::DataType output_type(int output, nvinfer1::DataType model) const;
  // Bytes that suffice for these shapes of the inputs and all smaller ones, on any device. Throws
  // Error for shapes that no call has.
  size_t workspace(const std::vector<nvinfer1::Dims>& shapes, nvinfer1::DataType model) const;
  // Launches one call: attention, then append. Throws Error.
  void run(const nvinfer1::PluginTensorDesc* input_descs, const void* const* inputs,
           void* const* outputs, void* workspace, cudaStream_t stream) const;

 private:
  std::string layer_;
  Attributes attributes_;
  std::shared_ptr<std::atomic<int32_t>> asked_;  // KiB of workspace, the most that was asked for
  int32_t asked_field_ = 0;                      // of fields()
  std::string model_;  // the type of the model; empty: that of the first input
};

// Fields of the table with their defaults, which live as long as the library. `chooses`: TensorRT
// chooses between FP16 and FP32 for each layer; then a field more, model_dtype, keeps the node in
// the type of the graph.
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
