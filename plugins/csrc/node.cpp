#include "node.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace vkvx {

namespace {

constexpr int kBaseline = 16;  // bits of a cache that is not packed

bool is_packed(const Attributes& attributes) { return attributes.key_bits != kBaseline; }

bool needs_metrics(const Attributes& attributes) {
  return is_packed(attributes) &&
         kNeedsMetrics[number_of("quantizer", attributes.quantizer, kQuantizerNames)];
}

VkvxParams params_of(const Attributes& attributes) {
  return params_of(attributes, [](const char* name, const std::string& given, const auto& names) {
    return number_of(name, given, names);
  });
}

// Values of the symbols, as the shapes of the inputs bind them.
class Sizes {
 public:
  Sizes(const Attributes& attributes, bool exact) : exact_(exact) {
    std::fill(values_, values_ + kSymbols, -1);
    of(kBk) = is_packed(attributes) ? attributes.key_bits : 1;
    of(kBv) = is_packed(attributes) ? attributes.value_bits : 1;
  }

  void take(const Tensor& tensor, const Extents& given) {
    if (given.rank != tensor.rank)
      throw Error(std::string(tensor.name) + " has " + std::to_string(given.rank) +
                  " dimensions; expected " + std::to_string(tensor.rank));
    for (int axis = 0; axis < tensor.rank; ++axis) take(tensor, axis, given.sizes[axis]);
  }

  int64_t& of(Symbol symbol) { return values_[symbol + kSymbols]; }

 private:
  void take(const Tensor& tensor, int axis, int64_t given) {
    const int symbol = tensor.shape[axis];
    if (given < 0 || given > INT32_MAX) throw mismatch(tensor, axis, given, "a size");
    if (symbol == kD32) of(kD32) = of(kD) / 32;
    if (symbol == kD41) of(kD41) = of(kD) / 4 + 1;
    const bool fixed =
        symbol > 0 || symbol == kBk || symbol == kBv || symbol == kD32 || symbol == kD41;
    const int64_t known = symbol > 0 ? symbol : of(static_cast<Symbol>(symbol));
    if (known < 0 || (!fixed && !exact_)) {
      of(static_cast<Symbol>(symbol)) = std::max(known, given);
    } else if (given != known) {
      throw mismatch(
          tensor, axis, given,
          std::to_string(known) +
              (symbol > 0 ? "" : std::string(" (") + kSymbolNames[symbol + kSymbols] + ")"));
    }
  }

  static Error mismatch(const Tensor& tensor, int axis, int64_t given,
                        const std::string& expected) {
    return Error(std::string(tensor.name) + " has size " + std::to_string(given) + " on axis " +
                 std::to_string(axis) + "; expected " + expected);
  }

  bool exact_;
  int64_t values_[kSymbols];
};

size_t bytes_of(const Tensor& tensor, const Extents& shape, int32_t dtype) {
  const bool two =
      tensor.type == Type::kFloat16 || (tensor.type == Type::kModel && dtype != VKVX_FLOAT32);
  size_t bytes = two ? 2 : 4;
  for (int axis = 0; axis < shape.rank; ++axis) bytes *= shape.sizes[axis];
  return bytes;
}

}  // namespace

void check(int code) {
  if (code != VKVX_OK) throw Error(vkvx_last_error());
}

void check_attributes(const Attributes& attributes) {
  const std::string wrong = attributes.out_of_range();
  if (!wrong.empty()) throw Error(wrong);
  VkvxParams p = params_of(attributes);  // the rest is checked by the library: the smallest shapes
  p.query_heads = p.kv_heads = 1;
  p.head_dim = 32;
  size_t bytes;
  check(vkvx_workspace_bound(&p, &bytes));
}

int input_count(const Attributes& attributes) {
  return kInputs + (needs_metrics(attributes) ? kMetricInputs : 0) +
         (attributes.sliding_window ? kWindowInputs : 0);
}

const Tensor& input(const Attributes& attributes, int i) {
  if (attributes.text_bits != kBaseline)
    for (size_t row = 0; row < std::size(kTextRows); ++row)
      if (kTextRows[row] == i) return kTextRows8[row];
  return kTable[i >= kInputs && !needs_metrics(attributes) ? i + kMetricInputs : i];
}

const Tensor& output(const Attributes& attributes, int i) {
  return input(attributes, i == 0 ? 0 : kAliases[i]);
}

void check_counts(const Attributes& attributes, int inputs, int outputs) {
  const int expected = input_count(attributes);
  if (inputs != expected || outputs != kOutputs)
    throw Error("the node has " + std::to_string(inputs) + " inputs and " +
                std::to_string(outputs) + " outputs; expected " + std::to_string(expected) +
                " and " + std::to_string(kOutputs) + " for these attributes");
}

VkvxParams call_params(const Attributes& attributes, int32_t dtype,
                       const std::vector<Extents>& inputs, bool exact) {
  Sizes sizes(attributes, exact);
  for (size_t i = 0; i < inputs.size(); ++i)
    sizes.take(input(attributes, static_cast<int>(i)), inputs[i]);
  VkvxParams p = params_of(attributes);
  p.dtype = dtype;
  for (const Size& size : kSizes) {
    const int64_t value = sizes.of(size.symbol) * (size.unit ? p.*size.unit : 1);
    if (value > INT32_MAX)
      throw Error(std::string(size.name) + " is " + std::to_string(value) +
                  "; give less than 2^31");
    p.*size.field = static_cast<int32_t>(value);
  }
  if (exact && sizes.of(kC128) * kTile != p.visual_capacity)
    throw Error("visual_key has " + std::to_string(sizes.of(kC128)) +
                " tiles of 128 tokens; expected " + std::to_string(p.visual_capacity / kTile) +
                " for the groups of visual_count");
  return p;
}

void set_addresses(VkvxParams& p, const Attributes& attributes, const std::vector<Extents>& shapes,
                   const void* const* inputs, void* const* outputs, cudaStream_t stream) {
  const auto bytes = [&](int i) { return bytes_of(input(attributes, i), shapes[i], p.dtype); };
  const auto set = [&](int i, const void* pointer) {
    // The address of an empty tensor is never read, but null says that one is missing.
    if (!bytes(i)) pointer = &kTable;
    std::memcpy(reinterpret_cast<char*>(&p) + input(attributes, i).field, &pointer, sizeof pointer);
  };
  for (size_t i = 0; i < shapes.size(); ++i) set(static_cast<int>(i), inputs[i]);
  for (int out = 1; out < kOutputs; ++out) {
    const int from = kAliases[out];
    if (outputs[out] == nullptr || outputs[out] == inputs[from]) continue;
    if (bytes(from) && cudaMemcpyAsync(outputs[out], inputs[from], bytes(from),
                                       cudaMemcpyDeviceToDevice, stream) != cudaSuccess)
      throw Error(std::string(kTable[from].name) + ": " + cudaGetErrorString(cudaGetLastError()));
    set(from, outputs[out]);
  }
  p.output = bytes(0) ? outputs[0] : const_cast<void*>(static_cast<const void*>(&kTable));
  const int64_t head = int64_t{p.positions} * p.head_dim;
  const int64_t strides[3] = {p.kv_heads * head, head, p.head_dim};
  std::copy(strides, strides + 3, p.key_stride);
  std::copy(strides, strides + 3, p.value_stride);
  std::copy(strides, strides + 3, p.query_stride);
  p.query_stride[0] = p.query_heads * head;
}

void clear_workspace(const VkvxParams& params, cudaStream_t stream) {
  size_t zeroed;
  check(vkvx_workspace_zeroed(&params, &zeroed));
  if (zeroed > params.workspace_bytes)
    throw Error("there are " + std::to_string(params.workspace_bytes) +
                " bytes of workspace, too few: " + std::to_string(zeroed) + " are needed");
  if (zeroed && cudaMemsetAsync(params.workspace, 0, zeroed, stream) != cudaSuccess)
    throw Error(std::string("workspace: ") + cudaGetErrorString(cudaGetLastError()));
}

}  // namespace vkvx
