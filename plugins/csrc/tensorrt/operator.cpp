#include "operator.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

namespace vkvx {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

constexpr const char* kWorkspaceField = "workspace_kib";
constexpr const char* kModelField = "model_dtype";

template <int kCount>
int number_of(const char* what, const std::string& given, const char* const (&names)[kCount]) {
  std::string known;
  for (int i = 0; i < kCount; ++i) {
    if (given == names[i]) return i;
    known += (i ? ", " : "") + std::string(names[i]);
  }
  throw Error(std::string(what) + " is '" + given + "'; give one of " + known);
}

constexpr int kBaseline = 16;  // bits of a cache that is not packed

bool is_packed(const Attributes& attributes) { return attributes.key_bits != kBaseline; }

bool needs_metrics(const Attributes& attributes) {
  return is_packed(attributes) &&
         kNeedsMetrics[number_of("quantizer", attributes.quantizer, kQuantizerNames)];
}

// Input i of a node: those that it does without are left out of the table.
const Tensor& input(const Attributes& attributes, int i) {
  if (attributes.text_bits != kBaseline)
    for (size_t row = 0; row < std::size(kTextRows); ++row)
      if (kTextRows[row] == i) return kTextRows8[row];
  return kTable[i >= kInputs && !needs_metrics(attributes) ? i + kMetricInputs : i];
}

bool model_type(DataType type, int32_t* number) {
  switch (type) {
    case DataType::kHALF:
      *number = VKVX_FLOAT16;
      return true;
    case DataType::kFLOAT:
      *number = VKVX_FLOAT32;
      return true;
#if defined(TRT_MAJOR_RTX) || NV_TENSORRT_MAJOR >= 9
    case DataType::kBF16:
      *number = VKVX_BFLOAT16;
      return true;
#endif
    default:
      return false;
  }
}

// Values of the symbols, as the shapes of the inputs bind them.
class Sizes {
 public:
  // Exact: every tensor has to agree on a symbol. Otherwise the greatest counts, as upper bounds of
  // dims need not agree.
  Sizes(const Attributes& attributes, bool exact) : exact_(exact) {
    std::fill(values_, values_ + kSymbols, -1);
    of(kBk) = is_packed(attributes) ? attributes.key_bits : 1;
    of(kBv) = is_packed(attributes) ? attributes.value_bits : 1;
  }

  void take(const Tensor& tensor, const Dims& dims) {
    if (dims.nbDims != tensor.rank)
      throw Error(std::string(tensor.name) + " has " + std::to_string(dims.nbDims) +
                  " dimensions; expected " + std::to_string(tensor.rank));
    for (int axis = 0; axis < tensor.rank; ++axis) {
      const int symbol = tensor.shape[axis];
      const int64_t given = dims.d[axis];
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
  }

  int64_t& of(Symbol symbol) { return values_[symbol + kSymbols]; }

 private:
  static Error mismatch(const Tensor& tensor, int axis, int64_t given,
                        const std::string& expected) {
    return Error(std::string(tensor.name) + " has size " + std::to_string(given) + " on axis " +
                 std::to_string(axis) + "; expected " + expected);
  }

  bool exact_;
  int64_t values_[kSymbols];
};

VkvxParams params_of(const Attributes& attributes) {
  return params_of(attributes, [](const char* name, const std::string& given, const auto& names) {
    return number_of(name, given, names);
  });
}

VkvxParams params_of(const Attributes& attributes, Sizes& sizes, DataType model) {
  VkvxParams p = params_of(attributes);
  if (!model_type(model, &p.dtype))
    throw Error("query is of a type that is not supported; expected float16, bfloat16 or float32");
  for (const Size& size : kSizes) {
    const int64_t value = sizes.of(size.symbol) * (size.unit ? p.*size.unit : 1);
    if (value > INT32_MAX)
      throw Error(std::string(size.name) + " is " + std::to_string(value) +
                  "; give less than 2^31");
    p.*size.field = static_cast<int32_t>(value);
  }
  return p;
}

// Throws what the library complains of.
void check(int code) {
  if (code != VKVX_OK) throw Error(vkvx_last_error());
}

void check_attributes(const Attributes& a) {
  const std::string wrong = a.out_of_range();
  if (!wrong.empty()) throw Error(wrong);
  VkvxParams p = params_of(a);  // the rest is checked by the library, with the smallest shapes
  p.query_heads = p.kv_heads = 1;
  p.head_dim = 32;
  size_t bytes;
  check(vkvx_workspace_bound(&p, &bytes));
}

template <class Value>
constexpr PluginFieldType field_type() {
  if constexpr (std::is_same_v<Value, std::string>) return PluginFieldType::kCHAR;
  return std::is_same_v<Value, float> ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

template <class Value>
PluginField field_of(const char* name, const Value& value) {
  if constexpr (std::is_same_v<Value, std::string>)
    return {name, value.data(), field_type<Value>(), static_cast<int32_t>(value.size())};
  return {name, &value, field_type<Value>(), 1};
}

template <class Value>
Value value_of(const PluginField& field) {
  constexpr PluginFieldType type = field_type<Value>();
  const bool text = std::is_same_v<Value, std::string>;
  if (field.type != type || field.data == nullptr || (text ? field.length < 0 : field.length != 1))
    throw Error("field '" + std::string(field.name) + "' has type " +
                std::to_string(static_cast<int>(field.type)) + " and length " +
                std::to_string(field.length) + "; expected " +
                (text                           ? "text (CHAR)"
                 : std::is_same_v<Value, float> ? "one FLOAT32"
                                                : "one INT32"));
  if constexpr (std::is_same_v<Value, std::string>) {
    const char* data = static_cast<const char*>(field.data);
    return std::string(data, strnlen(data, field.length));
  } else {
    Value value;
    std::memcpy(&value, field.data, sizeof value);
    return value;
  }
}

int64_t bytes_of(const Tensor& tensor, const Dims& dims, DataType model) {
  int64_t bytes =
      tensor.type == Type::kFloat16 || (tensor.type == Type::kModel && model != DataType::kFLOAT)
          ? 2
          : 4;
  for (int axis = 0; axis < dims.nbDims; ++axis) bytes *= dims.d[axis];
  return bytes;
}

}  // namespace

Operator::Operator(const char* layer, const nvinfer1::PluginFieldCollection* fields)
    : layer_(layer ? layer : ""), asked_(std::make_shared<std::atomic<int32_t>>(0)) {
  for (int i = 0; fields != nullptr && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.name == nullptr) throw Error("a field has no name");
    bool known = false;
    Attributes::visit(attributes_, [&](const char* name, auto& member) {
      if (std::strcmp(name, field.name)) return;
      member = value_of<std::decay_t<decltype(member)>>(field);
      known = true;
    });
    if (std::strcmp(kWorkspaceField, field.name) == 0) {
      *asked_ = value_of<int32_t>(field);
      known = true;
    } else if (std::strcmp(kModelField, field.name) == 0) {
      model_ = value_of<std::string>(field);
      if (!model_.empty()) number_of(kModelField, model_, kDtypeNames);
      known = true;
    }
    if (!known)
      throw Error("field '" + std::string(field.name) +
                  "' is not known; vkvx::VisualKVAttention version 1 has no such attribute");
  }
  check_attributes(attributes_);
}

std::vector<PluginField> Operator::fields() {
  std::vector<PluginField> fields;
  Attributes::visit(attributes_, [&](const char* name, const auto& member) {
    fields.push_back(field_of(name, member));
  });
  asked_field_ = *asked_;
  fields.push_back(field_of(kWorkspaceField, asked_field_));
  if (!model_.empty()) fields.push_back(field_of(kModelField, model_));
  return fields;
}

int Operator::input_count() const {
  return kInputs + (needs_metrics(attributes_) ? kMetricInputs : 0) +
         (attributes_.sliding_window ? kWindowInputs : 0);
}

void Operator::check_counts(int inputs, int outputs) const {
  if (inputs != input_count() || outputs != kOutputs)
    throw Error("the node has " + std::to_string(inputs) + " inputs and " +
                std::to_string(outputs) + " outputs; expected " + std::to_string(input_count()) +
                " and " + std::to_string(kOutputs) + " for these attributes");
}

bool Operator::supports(int position, DataType type, nvinfer1::TensorFormat format,
                        DataType model) const {
  const int inputs = input_count();
  if (format != nvinfer1::TensorFormat::kLINEAR || position < 0 || position >= inputs + kOutputs)
    return false;
  const int output = position - inputs;
  const Tensor& tensor = input(attributes_, output < 0    ? position
                                            : output == 0 ? 0
                                                          : kAliases[output]);
  int32_t number;
  switch (tensor.type) {
    case Type::kModel:
      return type == model && model_type(type, &number) &&
             (model_.empty() || model_ == kDtypeNames[number]);
    case Type::kInt32:
      return type == DataType::kINT32;
    case Type::kFloat16:
      return type == DataType::kHALF;
    default:
      return type == DataType::kFLOAT;
  }
}

DataType Operator::output_type(int output, DataType model) const {
  const Type type = input(attributes_, output == 0 ? 0 : kAliases[output]).type;
  return type == Type::kModel ? model : type == Type::kInt32 ? DataType::kINT32 : DataType::kHALF;
}

size_t Operator::workspace(const std::vector<Dims>& shapes, DataType model) const {
  check_counts(static_cast<int>(shapes.size()), kOutputs);
  Sizes sizes(attributes_, false);
  for (size_t i = 0; i < shapes.size(); ++i)
    sizes.take(input(attributes_, static_cast<int>(i)), shapes[i]);
  const VkvxParams params = params_of(attributes_, sizes, model);
  size_t bytes;
  check(vkvx_workspace_bound(&params, &bytes));
  const size_t kib = bytes / 1024 + 1;
  if (kib > INT32_MAX) throw Error("these shapes need more than 2 TiB of workspace");
  int32_t before = *asked_;
  while (before < static_cast<int32_t>(kib) &&
         !asked_->compare_exchange_weak(before, static_cast<int32_t>(kib))) {
  }
  return kib * 1024;
}

void Operator::run(const nvinfer1::PluginTensorDesc* descs, const void* const* inputs,
                   void* const* outputs, void* workspace, cudaStream_t stream) const {
  const int count = input_count();
  const DataType model = descs[0].type;
  Sizes sizes(attributes_, true);
  for (int i = 0; i < count; ++i) {
    if (!supports(i, descs[i].type, descs[i].format, model))
      throw Error(std::string(input(attributes_, i).name) +
                  " has a type or format that is not supported");
    sizes.take(input(attributes_, i), descs[i].dims);
  }
  VkvxParams p = params_of(attributes_, sizes, model);
  if (sizes.of(kC128) * kTile != p.visual_capacity)
    throw Error("visual_key has " + std::to_string(sizes.of(kC128)) +
                " tiles of 128 tokens; expected " + std::to_string(p.visual_capacity / kTile) +
                " for the groups of visual_count");

  // The address of an empty tensor is never read, but null says that one is missing.
  const auto address = [&](int i, const void* pointer) {
    return const_cast<void*>(bytes_of(input(attributes_, i), descs[i].dims, model)
                                 ? pointer
                                 : static_cast<const void*>(&kTable));
  };
  // In place where TensorRT binds output and input to one address; else the output starts as a
  // copy.
  const auto cache = [&](int output) {
    const int from = kAliases[output];
    if (inputs[from] != outputs[output]) {
      const int64_t bytes = bytes_of(input(attributes_, from), descs[from].dims, model);
      if (bytes && cudaMemcpyAsync(outputs[output], inputs[from], bytes, cudaMemcpyDeviceToDevice,
                                   stream) != cudaSuccess)
        throw Error(std::string(kTable[from].name) + ": " + cudaGetErrorString(cudaGetLastError()));
    }
    return address(from, outputs[output]);
  };
  const auto set = [&](const Tensor& tensor, void* pointer) {
    std::memcpy(reinterpret_cast<char*>(&p) + tensor.field, &pointer, sizeof pointer);
  };
  for (int i = 0; i < count; ++i) set(input(attributes_, i), address(i, inputs[i]));
  for (int output = 1; output < kOutputs; ++output) set(kTable[kAliases[output]], cache(output));
  p.output = address(0, outputs[0]);
  const int64_t query = int64_t{p.positions} * p.head_dim;
  const int64_t strides[3] = {p.kv_heads * query, query, p.head_dim};
  std::copy(strides, strides + 3, p.key_stride);
  std::copy(strides, strides + 3, p.value_stride);
  std::copy(strides, strides + 3, p.query_stride);
  p.query_stride[0] = p.query_heads * query;

  p.workspace = workspace;
  p.workspace_bytes = *asked_ * size_t{1024};
  size_t zeroed;
  check(vkvx_workspace_zeroed(&p, &zeroed));
  if (zeroed > p.workspace_bytes)
    throw Error("the engine reserves " + std::to_string(p.workspace_bytes) +
                " bytes of workspace, too few; build it again with this plugin");
  if (zeroed && cudaMemsetAsync(workspace, 0, zeroed, stream) !=
                    cudaSuccess)  // TensorRT lends the workspace to other layers
    throw Error(std::string("workspace: ") + cudaGetErrorString(cudaGetLastError()));
  check(vkvx_step(&p, stream));
}

const nvinfer1::PluginFieldCollection* table_fields(bool chooses) {
  static const Attributes defaults;
  static const std::string open;
  static const std::vector<PluginField> fields = [] {
    std::vector<PluginField> made;
    Attributes::visit(defaults, [&](const char* name, const auto& member) {
      made.push_back(field_of(name, member));
    });
    made.push_back(field_of(kModelField, open));
    return made;
  }();
  static const int32_t count = static_cast<int32_t>(fields.size());
  static const nvinfer1::PluginFieldCollection typed{count - 1, fields.data()},
      choosing{count, fields.data()};
  return chooses ? &choosing : &typed;
}

}  // namespace vkvx
