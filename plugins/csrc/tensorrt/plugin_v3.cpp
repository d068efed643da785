// vkvx::VisualKVAttention for TensorRT 10.3 and newer, TensorRT 11 and TensorRT for RTX. Links none
// of them: they call what is exported here.
#include "operator.h"

#if !defined(TRT_MAJOR_RTX) && NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR < 1003
#error "plugin_v3.cpp needs the headers of TensorRT 10.3 or newer; plugin_v2.cpp serves older ones"
#endif

namespace vkvx {

namespace {

using namespace nvinfer1;

class PluginV3 : public IPluginV3,
                 public IPluginV3OneCore,
                 public IPluginV3OneBuildV2,
                 public IPluginV3OneRuntime {
 public:
  PluginV3(Operator op, const char* name_space) : op_(std::move(op)), namespace_(name_space) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuildV2*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  PluginV3* clone() noexcept override {
    return guarded(op_.layer(), static_cast<PluginV3*>(nullptr),
                   [&] { return new PluginV3(op_, namespace_); });
  }

  // Core
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return namespace_; }

  // Build
  int32_t getNbOutputs() const noexcept override { return kOutputs; }

  int32_t getAliasedInput(int32_t output) noexcept override {
    return output >= 0 && output < kOutputs ? kAliases[output] : -1;
  }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType* input_types,
                             int32_t inputs) const noexcept override {
    return guarded(op_.layer(), 1, [&] {
      op_.check_counts(inputs, outputs);
      for (int i = 0; i < outputs; ++i) types[i] = op_.output_type(i, input_types[0]);
      return 0;
    });
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t,
                          DimsExprs* out, int32_t outputs, IExprBuilder&) noexcept override {
    return guarded(op_.layer(), 1, [&] {
      op_.check_counts(inputs, outputs);
      for (int i = 0; i < outputs; ++i) out[i] = in[i == 0 ? 0 : kAliases[i]];
      return 0;
    });
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override {
    return guarded(op_.layer(), false, [&] {
      op_.check_counts(inputs, outputs);
      return op_.supports(position, tensors[position].desc.type, tensors[position].desc.format,
                          tensors[0].desc.type);
    });
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                          const DynamicPluginTensorDesc*, int32_t outputs) noexcept override {
    return guarded(op_.layer(), 1, [&] {
      op_.check_counts(inputs, outputs);
      op_.workspace(greatest(in, inputs),
                    in[0].desc.type);  // refuses what no call can have, before the engine is built
      return 0;
    });
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs,
                          const DynamicPluginTensorDesc*, int32_t) const noexcept override {
    return guarded(op_.layer(), size_t{0},
                   [&] { return op_.workspace(greatest(in, inputs), in[0].desc.type); });
  }

  // Runtime
  int32_t onShapeChange(const PluginTensorDesc*, int32_t inputs, const PluginTensorDesc*,
                        int32_t outputs) noexcept override {
    return guarded(op_.layer(), 1, [&] {
      op_.check_counts(inputs, outputs);
      return 0;
    });
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded(op_.layer(), 1, [&] {
      op_.run(in, inputs, outputs, workspace, stream);
      return 0;
    });
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    return guarded(op_.layer(), static_cast<const PluginFieldCollection*>(nullptr), [&] {
      fields_ = op_.fields();
      collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
      return &collection_;
    });
  }

 private:
  static std::vector<Dims> greatest(const DynamicPluginTensorDesc* in, int32_t inputs) {
    std::vector<Dims> shapes(inputs);
    for (int i = 0; i < inputs; ++i) shapes[i] = in[i].max;
    return shapes;
  }

  Operator op_;
  const char* namespace_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class CreatorV3 : public IPluginCreatorV3One {
 public:
  explicit CreatorV3(const char* name_space) : namespace_(name_space) {}

  IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fields,
                          TensorRTPhase) noexcept override {
    return guarded(name ? name : "", static_cast<IPluginV3*>(nullptr),
                   [&] { return new PluginV3(Operator(name, fields), namespace_); });
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return table_fields(false); }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return namespace_; }

 private:
  const char* namespace_;
};

}  // namespace

}  // namespace vkvx

extern "C" {

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static vkvx::CreatorV3 plain(vkvx::kNamespaces[0]), named(vkvx::kNamespaces[1]);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&plain, &named};
  count = 2;
  return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { vkvx::set_logger_finder(finder); }
}
