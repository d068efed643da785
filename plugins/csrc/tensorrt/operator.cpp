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

constexpr const char* kWorkspaceField = "workspace_kib";
constexpr const char* kModelField = "model_dtype";

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

// Throws Error for a type that the library does not take.
int32_t dtype_of(DataType model) {
  int32_t number;
  if (model_type(model, &number)) return number;
  throw Error("query is of a type that is not supported; expected float16, bfloat16 or float32");
}

Extents extents_of(const Dims& dims) {
  Extents shape;
  shape.rank = dims.nbDims;
  std::copy(dims.d, dims.d + dims.nbDims, shape.sizes);
  return shape;
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

void Operator::check_counts(int inputs, int outputs) const {
  vkvx::check_counts(attributes_, inputs, outputs);
}

bool Operator::supports(int position, DataType type, nvinfer1::TensorFormat format,
                        DataType model) const {
  const int inputs = input_count(attributes_);
  if (format != nvinfer1::TensorFormat::kLINEAR || position < 0 || position >= inputs + kOutputs)
    return false;
  const Tensor& tensor = position < inputs ? input(attributes_, position)
                                           : vkvx::output(attributes_, position - inputs);
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
  const Type type = vkvx::output(attributes_, output).type;
  return type == Type::kModel ? model : type == Type::kInt32 ? DataType::kINT32 : DataType::kHALF;
}

size_t Operator::workspace(const std::vector<Dims>& shapes, DataType model) const {
  check_counts(static_cast<int>(shapes.size()), kOutputs);
  std::vector<Extents> extents(shapes.size());
  std::transform(shapes.begin(), shapes.end(), extents.begin(), extents_of);
  const VkvxParams params = call_params(attributes_, dtype_of(model), extents, false);
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
  const DataType model = descs[0].type;
  std::vector<Extents> shapes(input_count(attributes_));
  for (size_t i = 0; i < shapes.size(); ++i) {
    const int position = static_cast<int>(i);
    if (!supports(position, descs[i].type, descs[i].format, model))
      throw Error(std::string(input(attributes_, position).name) +
                  " has a type or format that is not supported");
    shapes[i] = extents_of(descs[i].dims);
  }
  VkvxParams p = call_params(attributes_, dtype_of(model), shapes, true);
  // In place where TensorRT binds output and input to one address.
  set_addresses(p, attributes_, shapes, inputs, outputs, stream);
  p.workspace = workspace;
  p.workspace_bytes = *asked_ * size_t{1024};
  clear_workspace(p, stream);  // TensorRT lends the workspace to other layers
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
