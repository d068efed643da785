#include "operator.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace vkvx {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace {

enum class Type { kModel, kInt32, kFloat16, kFloat32 };

// Letters of docs/operator.md: kTiles is C/128, kWords D/32. Numbers above 0 stand for themselves.
enum Symbol { kB = -14, kBc, kHq, kHkv, kS, kD, kNv, kNt, kTiles, kG, kN, kBk, kBv, kWords };
constexpr int kSymbols = 14;
constexpr const char* kSymbolNames[kSymbols] = {"B", "Bc", "Hq", "Hkv", "S", "D", "Nv", "Nt", "C/128", "G", "N", "bk", "bv", "D/32"};

struct Tensor {
  const char* name;
  Type type;
  int rank;
  int shape[6];
};

constexpr Tensor kTable[kInputs + kMetricInputs] = {
    {"query", Type::kModel, 4, {kB, kHq, kS, kD}},
    {"key", Type::kModel, 4, {kB, kHkv, kS, kD}},
    {"value", Type::kModel, 4, {kB, kHkv, kS, kD}},
    {"visual_index", Type::kInt32, 2, {kB, kNv}},
    {"text_index", Type::kInt32, 2, {kB, kNt}},
    {"slot", Type::kInt32, 1, {kB}},
    {"visual_key", Type::kInt32, 6, {kBc, kHkv, kTiles, kBk, 128, kWords}},
    {"visual_key_params", Type::kFloat16, 5, {kBc, kHkv, kG, 3, kD}},
    {"visual_value", Type::kInt32, 6, {kBc, kHkv, kTiles, kBv, kD, 4}},
    {"visual_value_params", Type::kFloat16, 5, {kBc, kHkv, kG, 2, kD}},
    {"visual_count", Type::kInt32, 2, {kBc, kG}},
    {"text_key", Type::kModel, 4, {kBc, kHkv, kN, kD}},
    {"text_value", Type::kModel, 4, {kBc, kHkv, kN, kD}},
    {"text_count", Type::kInt32, 1, {kBc}},
    {"key_metric", Type::kFloat16, 3, {kHkv, kD, kD}},
    {"value_metric", Type::kFloat16, 3, {kHkv, kD, kD}},
    {"rotation", Type::kFloat32, 3, {kB, 2, kD}},
};

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

// In the order of the numbers in vkvx.h.
constexpr const char* kQuantizers[] = {"minmax", "quantile", "shrink", "lloyd", "shaped"};
constexpr const char* kCorrections[] = {"none", "affine", "expected"};
constexpr const char* kModels[] = {"float16", "bfloat16", "float32"};

bool model_type(DataType type, int32_t* number) {
  switch (type) {
    case DataType::kHALF: *number = VKVX_FLOAT16; return true;
    case DataType::kFLOAT: *number = VKVX_FLOAT32; return true;
#if defined(TRT_MAJOR_RTX) || NV_TENSORRT_MAJOR >= 9
    case DataType::kBF16: *number = VKVX_BFLOAT16; return true;
#endif
    default: return false;
  }
}

// Values of the symbols, as the shapes of the inputs bind them.
class Sizes {
 public:
  // Exact: every tensor has to agree on a symbol. Otherwise the greatest counts, as upper bounds of dims need not agree.
  Sizes(const Attributes& attributes, bool exact) : exact_(exact) {
    std::fill(values_, values_ + kSymbols, -1);
    of(kBk) = attributes.packed() ? attributes.key_bits : 1;
    of(kBv) = attributes.packed() ? attributes.value_bits : 1;
  }

  void take(const Tensor& tensor, const Dims& dims) {
    if (dims.nbDims != tensor.rank)
      throw Error(std::string(tensor.name) + " has " + std::to_string(dims.nbDims) + " dimensions; expected " + std::to_string(tensor.rank));
    for (int axis = 0; axis < tensor.rank; ++axis) {
      const int symbol = tensor.shape[axis];
      const int64_t given = dims.d[axis];
      if (given < 0 || given > INT32_MAX) throw mismatch(tensor, axis, given, "a size");
      if (symbol == kWords && of(kWords) < 0) of(kWords) = of(kD) / 32;
      const bool fixed = symbol > 0 || symbol == kBk || symbol == kBv || symbol == kWords;
      const int64_t known = symbol > 0 ? symbol : of(static_cast<Symbol>(symbol));
      if (known < 0 || (!fixed && !exact_)) {
        of(static_cast<Symbol>(symbol)) = std::max(known, given);
      } else if (given != known) {
        throw mismatch(tensor, axis, given, std::to_string(known) + (symbol > 0 ? "" : std::string(" (") + kSymbolNames[symbol + kSymbols] + ")"));
      }
    }
  }

  int64_t& of(Symbol symbol) { return values_[symbol + kSymbols]; }

 private:
  static Error mismatch(const Tensor& tensor, int axis, int64_t given, const std::string& expected) {
    return Error(std::string(tensor.name) + " has size " + std::to_string(given) + " on axis " + std::to_string(axis) + "; expected " + expected);
  }

  bool exact_;
  int64_t values_[kSymbols];
};

VkvxParams params_of(const Attributes& a) {
  VkvxParams p{};
  p.size = sizeof(VkvxParams);
  p.group_size = a.group_size;
  p.key_bits = a.key_bits;
  p.value_bits = a.value_bits;
  p.quantizer = number_of("quantizer", a.quantizer, kQuantizers);
  p.correction = number_of("score_correction", a.score_correction, kCorrections);
  p.quantile_alpha_key = a.quantile_alpha_key;
  p.quantile_alpha_value = a.quantile_alpha_value;
  p.shrink_key = a.shrink_key;
  p.shrink_value = a.shrink_value;
  p.tau = a.tau;
  p.correction_limit = a.correction_limit;
  p.scale = a.scale;
  return p;
}

VkvxParams params_of(const Attributes& attributes, Sizes& sizes, DataType model) {
  VkvxParams p = params_of(attributes);
  if (!model_type(model, &p.dtype)) throw Error("query is of a type that is not supported; expected float16, bfloat16 or float32");
  const auto size = [&](Symbol symbol) { return static_cast<int32_t>(sizes.of(symbol)); };
  p.rows = size(kB);
  p.positions = size(kS);
  p.slots = size(kBc);
  p.query_heads = size(kHq);
  p.kv_heads = size(kHkv);
  p.head_dim = size(kD);
  if (sizes.of(kG) * attributes.group_size > INT32_MAX) throw Error("visual_count has more groups than fit 2^31 tokens");
  p.visual_capacity = size(kG) * attributes.group_size;
  p.text_capacity = size(kN);
  p.visual_entries = size(kNv);
  p.text_entries = size(kNt);
  return p;
}

// Throws what the library complains of.
void check(int code) {
  if (code != VKVX_OK) throw Error(vkvx_last_error());
}

void check_attributes(const Attributes& a) {
  if (a.softcap != 0.0f || a.sliding_window != 0) throw Error("softcap and sliding_window are reserved; only 0 is accepted");
  const auto fraction = [](const char* name, float value) {
    if (!(value >= 0.0f && value < 0.5f)) throw Error(std::string(name) + " is " + std::to_string(value) + "; give at least 0 and less than 0.5");
  };
  fraction("quantile_alpha_key", a.quantile_alpha_key);
  fraction("quantile_alpha_value", a.quantile_alpha_value);
  const auto factor = [](const char* name, float value) {
    if (!(value > 0.0f && value <= 1.0f)) throw Error(std::string(name) + " is " + std::to_string(value) + "; give more than 0 and at most 1");
  };
  factor("shrink_key", a.shrink_key);
  factor("shrink_value", a.shrink_value);
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
  if constexpr (std::is_same_v<Value, std::string>) return {name, value.data(), field_type<Value>(), static_cast<int32_t>(value.size())};
  return {name, &value, field_type<Value>(), 1};
}

template <class Value>
Value value_of(const PluginField& field) {
  constexpr PluginFieldType type = field_type<Value>();
  const bool text = std::is_same_v<Value, std::string>;
  if (field.type != type || field.data == nullptr || (text ? field.length < 0 : field.length != 1))
    throw Error("field '" + std::string(field.name) + "' has type " + std::to_string(static_cast<int>(field.type)) + " and length " +
                std::to_string(field.length) + "; expected " +
                (text ? "text (CHAR)" : std::is_same_v<Value, float> ? "one FLOAT32" : "one INT32"));
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
  int64_t bytes = tensor.type == Type::kFloat16 || (tensor.type == Type::kModel && model != DataType::kFLOAT) ? 2 : 4;
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
      if (!model_.empty()) number_of(kModelField, model_, kModels);
      known = true;
    }
    if (!known) throw Error("field '" + std::string(field.name) + "' is not known; vkvx::VisualKVAttention version 1 has no such attribute");
  }
  check_attributes(attributes_);
}

std::vector<PluginField> Operator::fields() {
  std::vector<PluginField> fields;
  Attributes::visit(attributes_, [&](const char* name, const auto& member) { fields.push_back(field_of(name, member)); });
  asked_field_ = *asked_;
  fields.push_back(field_of(kWorkspaceField, asked_field_));
  if (!model_.empty()) fields.push_back(field_of(kModelField, model_));
  return fields;
}

void Operator::check_counts(int inputs, int outputs) const {
  if (inputs != attributes_.inputs() || outputs != kOutputs)
    throw Error("the node has " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs; expected " +
                std::to_string(attributes_.inputs()) + " and " + std::to_string(kOutputs) + " for these attributes");
}

bool Operator::supports(int position, DataType type, nvinfer1::TensorFormat format, DataType model) const {
  const int inputs = attributes_.inputs();
  if (format != nvinfer1::TensorFormat::kLINEAR || position < 0 || position >= inputs + kOutputs) return false;
  const int output = position - inputs;
  const Tensor& tensor = kTable[output < 0 ? position : output == 0 ? 0 : kAliases[output]];
  int32_t number;
  switch (tensor.type) {
    case Type::kModel: return type == model && model_type(type, &number) && (model_.empty() || model_ == kModels[number]);
    case Type::kInt32: return type == DataType::kINT32;
    case Type::kFloat16: return type == DataType::kHALF;
    default: return type == DataType::kFLOAT;
  }
}

DataType Operator::output_type(int output, DataType model) {
  const Type type = kTable[output == 0 ? 0 : kAliases[output]].type;
  return type == Type::kModel ? model : type == Type::kInt32 ? DataType::kINT32 : DataType::kHALF;
}

size_t Operator::workspace(const std::vector<Dims>& shapes, DataType model) const {
  check_counts(static_cast<int>(shapes.size()), kOutputs);
  Sizes sizes(attributes_, false);
  for (size_t i = 0; i < shapes.size(); ++i) sizes.take(kTable[i], shapes[i]);
  const VkvxParams params = params_of(attributes_, sizes, model);
  size_t bytes;
  check(vkvx_workspace_bound(&params, &bytes));
  const size_t kib = bytes / 1024 + 1;
  if (kib > INT32_MAX) throw Error("these shapes need more than 2 TiB of workspace");
  int32_t before = *asked_;
  while (before < static_cast<int32_t>(kib) && !asked_->compare_exchange_weak(before, static_cast<int32_t>(kib))) {
  }
  return kib * 1024;
}

void Operator::run(const nvinfer1::PluginTensorDesc* descs, const void* const* inputs, void* const* outputs, void* workspace,
                   cudaStream_t stream) const {
  const int count = attributes_.inputs();
  const DataType model = descs[0].type;
  Sizes sizes(attributes_, true);
  for (int i = 0; i < count; ++i) {
    if (!supports(i, descs[i].type, descs[i].format, model)) throw Error(std::string(kTable[i].name) + " has a type or format that is not supported");
    sizes.take(kTable[i], descs[i].dims);
  }
  VkvxParams p = params_of(attributes_, sizes, model);
  if (sizes.of(kTiles) * 128 != p.visual_capacity)
    throw Error("visual_key has " + std::to_string(sizes.of(kTiles)) + " tiles of 128 tokens; expected " + std::to_string(p.visual_capacity / 128) +
                " for the groups of visual_count");

  // The address of an empty tensor is never read, but null says that one is missing.
  const auto address = [&](int i, const void* pointer) {
    return const_cast<void*>(bytes_of(kTable[i], descs[i].dims, model) ? pointer : static_cast<const void*>(&kTable));
  };
  const auto input = [&](int i) { return address(i, inputs[i]); };
  // In place where TensorRT binds output and input to one address; else the output starts as a copy.
  const auto cache = [&](int output) {
    const int from = kAliases[output];
    if (inputs[from] != outputs[output]) {
      const int64_t bytes = bytes_of(kTable[from], descs[from].dims, model);
      if (bytes && cudaMemcpyAsync(outputs[output], inputs[from], bytes, cudaMemcpyDeviceToDevice, stream) != cudaSuccess)
        throw Error(std::string(kTable[from].name) + ": " + cudaGetErrorString(cudaGetLastError()));
    }
    return address(from, outputs[output]);
  };
  p.query = input(0);
  p.key = input(1);
  p.value = input(2);
  p.visual_index = static_cast<const int32_t*>(input(3));
  p.text_index = static_cast<const int32_t*>(input(4));
  p.slot = static_cast<const int32_t*>(input(5));
  p.visual_key = static_cast<int32_t*>(cache(1));
  p.visual_key_params = cache(2);
  p.visual_value = static_cast<int32_t*>(cache(3));
  p.visual_value_params = cache(4);
  p.visual_count = static_cast<const int32_t*>(input(10));
  p.text_key = cache(5);
  p.text_value = cache(6);
  p.text_count = static_cast<const int32_t*>(input(13));
  if (count > kInputs) {
    p.key_metric = input(14);
    p.value_metric = input(15);
    p.rotation = static_cast<const float*>(input(16));
  }
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
    throw Error("the engine reserves " + std::to_string(p.workspace_bytes) + " bytes of workspace, too few; build it again with this plugin");
  if (zeroed && cudaMemsetAsync(workspace, 0, zeroed, stream) != cudaSuccess)  // TensorRT lends the workspace to other layers
    throw Error(std::string("workspace: ") + cudaGetErrorString(cudaGetLastError()));
  check(vkvx_attention(&p, stream));
  check(vkvx_append(&p, stream));
}

const nvinfer1::PluginFieldCollection* table_fields(bool chooses) {
  static const Attributes defaults;
  static const std::string open;
  static const std::vector<PluginField> fields = [] {
    std::vector<PluginField> made;
    Attributes::visit(defaults, [&](const char* name, const auto& member) { made.push_back(field_of(name, member)); });
    made.push_back(field_of(kModelField, open));
    return made;
  }();
  static const int32_t count = static_cast<int32_t>(fields.size());
  static const nvinfer1::PluginFieldCollection typed{count - 1, fields.data()}, choosing{count, fields.data()};
  return chooses ? &choosing : &typed;
}

}  // namespace vkvx
