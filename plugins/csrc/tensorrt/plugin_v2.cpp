// vkvx::VisualKVAttention for TensorRT 8.6, which has no IPluginV3. Links no TensorRT library.
#include <cstring>

#include "operator.h"

namespace vkvx {

namespace {

using namespace nvinfer1;

// Fields as bytes, each: name, type, length, data. Text and numbers of this machine's byte order.
class Writer {
 public:
  explicit Writer(char* to) : to_(to) {}

  void write(const PluginField& field) {
    const int32_t numbers[] = {static_cast<int32_t>(std::strlen(field.name)),
                               static_cast<int32_t>(field.type), field.length};
    put(numbers, sizeof numbers);
    put(field.name, numbers[0]);
    put(field.data, bytes_of(field.type, field.length));
  }

  static size_t bytes_of(PluginFieldType type, int32_t length) {
    return type == PluginFieldType::kCHAR ? length : length * 4;
  }
  size_t written() const { return written_; }

 private:
  void put(const void* data, size_t bytes) {
    if (to_ != nullptr) std::memcpy(to_ + written_, data, bytes);
    written_ += bytes;
  }

  char* to_;  // null: only counts
  size_t written_ = 0;
};

// What Writer wrote; throws Error if it is cut off.
class Fields {
 public:
  Fields(const void* data, size_t length) : at_(static_cast<const char*>(data)), left_(length) {
    while (left_ > 0) {
      int32_t numbers[3];
      std::memcpy(numbers, take(sizeof numbers), sizeof numbers);
      if (numbers[0] < 0 || numbers[2] < 0) throw cut_off();
      const auto type = static_cast<PluginFieldType>(numbers[1]);
      names_.push_back(std::make_unique<std::string>(take(numbers[0]), numbers[0]));
      fields_.emplace_back(names_.back()->c_str(), take(Writer::bytes_of(type, numbers[2])), type,
                           numbers[2]);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  const PluginFieldCollection* get() const { return &collection_; }

 private:
  static Error cut_off() {
    return Error("the data of this layer in the engine are damaged; build the engine again");
  }

  const char* take(size_t bytes) {
    if (bytes > left_) throw cut_off();
    const char* here = at_;
    at_ += bytes;
    left_ -= bytes;
    return here;
  }

  const char* at_;
  size_t left_;
  std::vector<std::unique_ptr<std::string>> names_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class PluginV2 : public IPluginV2DynamicExt {
 public:
  PluginV2(Operator op, std::string name_space)
      : op_(std::move(op)), namespace_(std::move(name_space)) {}

  const char* getPluginType() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  void setPluginNamespace(const char* name_space) noexcept override { namespace_ = name_space; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  PluginV2* clone() const noexcept override {
    return guarded(op_.layer(), static_cast<PluginV2*>(nullptr),
                   [&] { return new PluginV2(op_, namespace_); });
  }

  size_t getSerializationSize() const noexcept override {
    return guarded(op_.layer(), size_t{0}, [&] { return write(nullptr); });
  }

  void serialize(void* buffer) const noexcept override {
    guarded(op_.layer(), size_t{0}, [&] { return write(static_cast<char*>(buffer)); });
  }

  DataType getOutputDataType(int32_t output, const DataType* input_types,
                             int32_t) const noexcept override {
    return op_.output_type(output, input_types[0]);
  }

  DimsExprs getOutputDimensions(int32_t output, const DimsExprs* in, int32_t inputs,
                                IExprBuilder&) noexcept override {
    return guarded(op_.layer(), DimsExprs{}, [&] {
      op_.check_counts(inputs, kOutputs);
      return in[output == 0 ? 0 : kAliases[output]];
    });
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return guarded(op_.layer(), false, [&] {
      op_.check_counts(inputs, outputs);
      return op_.supports(position, tensors[position].type, tensors[position].format,
                          tensors[0].type);
    });
  }

  void configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*,
                          int32_t) const noexcept override {
    return guarded(op_.layer(), size_t{0}, [&] {
      std::vector<Dims> shapes(inputs);
      for (int i = 0; i < inputs; ++i) shapes[i] = in[i].dims;
      return op_.workspace(shapes, in[0].type);
    });
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded(op_.layer(), 1, [&] {
      op_.run(in, inputs, outputs, workspace, stream);
      return 0;
    });
  }

 private:
  size_t write(char* to) const {
    Operator copy = op_;
    Writer writer(to);
    for (const PluginField& field : copy.fields()) writer.write(field);
    return writer.written();
  }

  Operator op_;
  std::string namespace_;
};

class CreatorV2 : public IPluginCreator {
 public:
  explicit CreatorV2(const char* name_space) : namespace_(name_space) {}

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const PluginFieldCollection* getFieldNames() noexcept override { return table_fields(true); }
  void setPluginNamespace(const char* name_space) noexcept override { namespace_ = name_space; }
  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  IPluginV2* createPlugin(const char* name, const PluginFieldCollection* fields) noexcept override {
    return guarded(name ? name : "", static_cast<IPluginV2*>(nullptr),
                   [&] { return new PluginV2(Operator(name, fields), namespace_); });
  }

  IPluginV2* deserializePlugin(const char* name, const void* data,
                               size_t length) noexcept override {
    return guarded(name ? name : "", static_cast<IPluginV2*>(nullptr), [&] {
      return new PluginV2(Operator(name, Fields(data, length).get()), namespace_);
    });
  }

 private:
  std::string namespace_;
};

}  // namespace

}  // namespace vkvx

extern "C" {

nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  static vkvx::CreatorV2 plain(vkvx::kNamespaces[0]), named(vkvx::kNamespaces[1]);
  static nvinfer1::IPluginCreator* const creators[] = {&plain, &named};
  count = 2;
  return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { vkvx::set_logger_finder(finder); }
}
