// Calls a plugin as TensorRT does, for tests through ctypes: build phase, what an engine stores, run phase.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace harness {

// IPluginRegistry as it lies in TensorRT 11 and TensorRT for RTX, which have dropped functions of the version in the headers.
struct Registry {
  virtual ~Registry() = default;
  virtual void setErrorRecorder(IErrorRecorder*) noexcept = 0;
  virtual IErrorRecorder* getErrorRecorder() const noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled(bool) = 0;
  virtual void* loadLibrary(const char* path) noexcept = 0;
  virtual void deregisterLibrary(void* handle) noexcept = 0;
  virtual bool registerCreator(IPluginCreatorInterface&, const char* name_space) noexcept = 0;
  virtual IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept = 0;
  virtual IPluginCreatorInterface* getCreator(const char* name, const char* version, const char* name_space) noexcept = 0;
};

}  // namespace harness

namespace {

using harness::Registry;

std::string messages;

struct Logger : ILogger {
  void log(Severity, const char* text) noexcept override { messages += text + std::string("\n"); }
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// A plugin object of either interface.
struct Node {
  virtual ~Node() = default;
  virtual size_t workspace(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) = 0;
  virtual bool supports(int position, const PluginTensorDesc* all, int inputs, int outputs) = 0;
  virtual int configure(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) = 0;
  virtual int output_type(int output, const DataType* types, int inputs) = 0;
  virtual int alias(int output) = 0;
  virtual Node* through_engine(const char* layer) = 0;  // what an engine with this node runs
  virtual int enqueue(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs, const void* const* from, void* const* to,
                      void* workspace, cudaStream_t stream) = 0;
};

std::vector<DynamicPluginTensorDesc> dynamic(const PluginTensorDesc* descs, int count) {
  std::vector<DynamicPluginTensorDesc> all(count);
  for (int i = 0; i < count; ++i) all[i].desc = descs[i], all[i].min = all[i].max = all[i].opt = descs[i].dims;
  return all;
}

struct NodeV3 : Node {
  NodeV3(IPluginCreatorV3One* creator, IPluginV3* plugin)
      : creator(creator),
        plugin(plugin),
        build(static_cast<IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD))),
        run(static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME))) {}

  size_t workspace(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) override {
    return build->getWorkspaceSize(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs);
  }
  bool supports(int position, const PluginTensorDesc* all, int inputs, int outputs) override {
    return build->supportsFormatCombination(position, dynamic(all, inputs + outputs).data(), inputs, outputs);
  }
  int configure(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) override {
    return build->configurePlugin(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs);
  }
  int output_type(int output, const DataType* types, int inputs) override {
    std::vector<DataType> all(build->getNbOutputs());
    return build->getOutputDataTypes(all.data(), static_cast<int>(all.size()), types, inputs) ? -1 : static_cast<int>(all[output]);
  }
  int alias(int output) override { return build->getAliasedInput(output); }
  Node* through_engine(const char* layer) override {
    std::unique_ptr<IPluginV3> stored(creator->createPlugin(layer, run->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    if (!stored) return nullptr;
    auto* runtime = static_cast<IPluginV3OneRuntime*>(stored->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return new NodeV3(creator, runtime->attachToContext(nullptr));
  }
  int enqueue(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs, const void* const* from, void* const* to,
              void* workspace, cudaStream_t stream) override {
    const int code = run->onShapeChange(in, inputs, out, outputs);
    return code ? code : run->enqueue(in, out, from, to, workspace, stream);
  }

  IPluginCreatorV3One* creator;
  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneBuildV2* build;
  IPluginV3OneRuntime* run;
};

struct NodeV2 : Node {
  NodeV2(IPluginCreator* creator, IPluginV2* plugin) : creator(creator), plugin(static_cast<IPluginV2DynamicExt*>(plugin)) {}
  ~NodeV2() override { plugin->destroy(); }

  size_t workspace(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) override {
    return plugin->getWorkspaceSize(in, inputs, out, outputs);
  }
  bool supports(int position, const PluginTensorDesc* all, int inputs, int outputs) override {
    return plugin->supportsFormatCombination(position, all, inputs, outputs);
  }
  int configure(const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) override {
    plugin->configurePlugin(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs);
    return 0;
  }
  int output_type(int output, const DataType* types, int inputs) override { return static_cast<int>(plugin->getOutputDataType(output, types, inputs)); }
  int alias(int) override { return -1; }
  Node* through_engine(const char* layer) override {
    std::vector<char> stored(plugin->getSerializationSize());
    plugin->serialize(stored.data());
    IPluginV2* again = creator->deserializePlugin(layer, stored.data(), stored.size());
    IPluginV2* cut = creator->deserializePlugin(layer, stored.data(), stored.size() - 1);
    if (!again || cut) return nullptr;
    auto* node = new NodeV2(creator, again->clone());
    again->destroy();
    node->plugin->initialize();
    return node;
  }
  int enqueue(const PluginTensorDesc* in, int, const PluginTensorDesc* out, int, const void* const* from, void* const* to, void* workspace,
              cudaStream_t stream) override {
    return plugin->enqueue(in, out, from, to, workspace, stream);
  }

  IPluginCreator* creator;
  IPluginV2DynamicExt* plugin;
};

struct Creator {
  IPluginCreatorV3One* v3 = nullptr;
  IPluginCreator* v2 = nullptr;
};

}  // namespace

extern "C" {

const char* harness_messages() { return messages.c_str(); }
void harness_forget_messages() { messages.clear(); }

// The creator of a plugin library: through the registry of `runtime`, a library of TensorRT for RTX, or from the plugin itself if that is null.
Creator* harness_creator(const char* runtime, const char* path, int interface, const char* name, const char* version, const char* name_space) {
  static std::vector<std::unique_ptr<Creator>> creators;
  static void* loaded = nullptr;
  auto creator = std::make_unique<Creator>();
  void* plugin = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (plugin == nullptr) return messages += dlerror(), nullptr;
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(plugin, "setLoggerFinder"));
  if (runtime != nullptr) {
    void* library = dlopen(runtime, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return messages += dlerror(), nullptr;
    auto* registry = reinterpret_cast<Registry* (*)()>(dlsym(library, "getPluginRegistry"))();
    if (loaded == nullptr) loaded = registry->loadLibrary(path);
    if (loaded == nullptr) return messages += "the registry does not load the library\n", nullptr;
    creator->v3 = static_cast<IPluginCreatorV3One*>(registry->getCreator(name, version, name_space));
  } else {
    const auto is_it = [&](auto* one) { return one->getPluginName() == std::string(name) && one->getPluginNamespace() == std::string(name_space); };
    int32_t count = 0;
    if (interface == 3) {
      auto* all = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(plugin, "getCreators"))(count);
      for (int i = 0; i < count; ++i)
        if (auto* one = static_cast<IPluginCreatorV3One*>(all[i]); is_it(one)) creator->v3 = one;
    } else {
      auto* all = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(dlsym(plugin, "getPluginCreators"))(count);
      for (int i = 0; i < count; ++i)
        if (is_it(all[i])) creator->v2 = all[i];
    }
  }
  set_finder(&finder);  // in place of the registry's, so that tests see the messages
  if (!creator->v3 && !creator->v2) return nullptr;
  creators.push_back(std::move(creator));
  return creators.back().get();
}

const PluginFieldCollection* harness_field_names(Creator* creator) {
  return creator->v3 ? creator->v3->getFieldNames() : creator->v2->getFieldNames();
}

Node* harness_create(Creator* creator, const char* layer, const PluginFieldCollection* fields) {
  if (creator->v3) {
    IPluginV3* plugin = creator->v3->createPlugin(layer, fields, TensorRTPhase::kBUILD);
    return plugin ? new NodeV3(creator->v3, plugin) : nullptr;
  }
  IPluginV2* plugin = creator->v2->createPlugin(layer, fields);
  return plugin ? new NodeV2(creator->v2, plugin) : nullptr;
}

size_t harness_workspace(Node* node, const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) {
  return node->workspace(in, inputs, out, outputs);
}
int harness_supports(Node* node, int position, const PluginTensorDesc* all, int inputs, int outputs) {
  return node->supports(position, all, inputs, outputs);
}
int harness_configure(Node* node, const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs) {
  return node->configure(in, inputs, out, outputs);
}
int harness_output_type(Node* node, int output, const DataType* types, int inputs) { return node->output_type(output, types, inputs); }
int harness_alias(Node* node, int output) { return node->alias(output); }
Node* harness_through_engine(Node* node, const char* layer) { return node->through_engine(layer); }
int harness_enqueue(Node* node, const PluginTensorDesc* in, int inputs, const PluginTensorDesc* out, int outputs, const void* const* from,
                    void* const* to, void* workspace, void* stream) {
  return node->enqueue(in, inputs, out, outputs, from, to, workspace, static_cast<cudaStream_t>(stream));
}
void harness_destroy(Node* node) { delete node; }
}
