#include "operator.h"

#include <cstring>
#include <memory>
#include <string>
#include <type_traits>

#include "../node.h"

#ifndef VKVX_PROVIDER  // a test runs this file on a CPU
#define VKVX_PROVIDER "CUDAExecutionProvider"
#endif

namespace vkvx::ort {

namespace {

constexpr int kAllInputs = kInputs + kMetricInputs + kWindowInputs;

struct Typed : CustomOp {
  int32_t dtype;      // of the model, as in vkvx.h
  int32_t text_bits;  // 16, or 8
};

// The shape inference of an operator is given no table of functions.
const Api* inference_api = nullptr;

ElementType model_type(int32_t dtype) {
  return dtype == VKVX_FLOAT16 ? kFloat16 : dtype == VKVX_BFLOAT16 ? kBFloat16 : kFloat;
}

ElementType type_of(const Tensor& tensor, int32_t dtype) {
  switch (tensor.type) {
    case Type::kModel:
      return model_type(dtype);
    case Type::kInt32:
      return kInt32;
    case Type::kFloat16:
      return kFloat16;
    default:
      return kFloat;
  }
}

Attributes with_text(const Typed& op) {
  Attributes attributes;
  attributes.text_bits = op.text_bits;
  return attributes;
}

struct Releaser {
  const Api* api;
  void operator()(TensorInfo* info) const { ReleaseTensorTypeAndShapeInfo(api, info); }
  void operator()(Allocator* allocator) const { ReleaseAllocator(api, allocator); }
};
using InfoPointer = std::unique_ptr<TensorInfo, Releaser>;

// An attribute of a node; keeps the default where the node does not have it. Throws Error.
class AttributeReader {
 public:
  AttributeReader(const Api* api, const KernelInfo* info) : api_(api), info_(info) {}

  void read(const char* name, int32_t& member) const {
    int64_t given;
    if (!is_there(name, KernelInfoGetAttribute_int64(api_, info_, name, &given))) return;
    if (given < INT32_MIN || given > INT32_MAX)
      throw Error(std::string(name) + " is " + std::to_string(given) + "; give less than 2^31");
    member = static_cast<int32_t>(given);
  }
  void read(const char* name, float& member) const {
    float given;
    if (is_there(name, KernelInfoGetAttribute_float(api_, info_, name, &given))) member = given;
  }
  void read(const char* name, std::string& member) const {
    size_t size = 0;
    if (!is_there(name, KernelInfoGetAttribute_string(api_, info_, name, nullptr, &size))) return;
    std::string given(size, '\0');
    check(api_, KernelInfoGetAttribute_string(api_, info_, name, given.data(), &size));
    member = given.c_str();
  }

 private:
  bool is_there(const char* name, Status* status) const {
    if (status == nullptr) return true;
    const std::string why = GetErrorMessage(api_, status);
    ReleaseStatus(api_, status);
    // Any other reason means that it has another type.
    if (why.find("No attribute with name") == std::string::npos)
      throw Error(std::string(name) + ": " + why);
    return false;
  }

  const Api* api_;
  const KernelInfo* info_;
};

// A node of a session.
class Kernel {
 public:
  Kernel(const Api* api, const Typed& op, const KernelInfo* info) : api_(api), dtype_(op.dtype) {
    const AttributeReader reader(api, info);
    Attributes::visit(attributes_,
                      [&](const char* name, auto& member) { reader.read(name, member); });
    check_attributes(attributes_);
    size_t inputs, outputs;
    check(api, KernelInfo_GetInputCount(api, info, &inputs));
    check(api, KernelInfo_GetOutputCount(api, info, &outputs));
    check_counts(attributes_, static_cast<int>(inputs), static_cast<int>(outputs));
    if (attributes_.text_bits != op.text_bits)
      throw Error("text_bits is " + std::to_string(attributes_.text_bits) +
                  ", but text_key has the type of " + std::to_string(op.text_bits) + " bits");
  }

  void run(KernelContext* context) const {
    std::vector<Extents> shapes(input_count(attributes_));
    std::vector<const void*> inputs(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      const Value* value;
      check(api_, KernelContext_GetInput(api_, context, i, &value));
      if (value == nullptr)
        throw Error(std::string(input(attributes_, static_cast<int>(i)).name) + " is missing");
      shapes[i] = take_shape(static_cast<int>(i), value);
      inputs[i] = address(const_cast<Value*>(value));
    }
    void* outputs[kOutputs] = {};
    Value* first = nullptr;
    bool appends = false;
    for (int i = 0; i < kOutputs; ++i) {
      const Extents& shape = shapes[i == 0 ? 0 : kAliases[i]];
      Value* value;
      check(api_, KernelContext_GetOutput(api_, context, i, shape.sizes, shape.rank, &value));
      if (i == 0) first = value;
      if (value == nullptr) continue;  // nothing reads this output
      outputs[i] = address(value);
      appends |= i > 0;
    }
    if (first == nullptr) throw Error("the node has no output 'output'");
    void* handle;
    check(api_, KernelContext_GetGPUComputeStream(api_, context, &handle));
    const auto stream = static_cast<cudaStream_t>(handle);
    VkvxParams p = call_params(attributes_, dtype_, shapes, true);
    set_addresses(p, attributes_, shapes, inputs.data(), outputs, stream);
    launch(p, appends, context, first, stream);
  }

 private:
  Extents take_shape(int i, const Value* value) const {
    const Tensor& tensor = input(attributes_, i);
    TensorInfo* given;
    check(api_, GetTensorTypeAndShape(api_, value, &given));
    const InfoPointer info(given, Releaser{api_});
    ElementType type;
    check(api_, GetTensorElementType(api_, given, &type));
    if (type != type_of(tensor, dtype_))
      throw Error(std::string(tensor.name) + " has a type that is not supported here");
    size_t rank;
    check(api_, GetDimensionsCount(api_, given, &rank));
    Extents shape;
    shape.rank = static_cast<int>(rank);
    if (rank <= kMostAxes) check(api_, GetDimensions(api_, given, shape.sizes, rank));
    return shape;  // another rank than the table's is refused with the sizes
  }

  void* address(Value* value) const {
    void* data;
    check(api_, GetTensorMutableData(api_, value, &data));
    return data;
  }

  // In scratch memory of the provider, which later nodes of the stream may get when this returns.
  void launch(VkvxParams& p, bool appends, KernelContext* context, const Value* beside,
              cudaStream_t stream) const {
    vkvx::check(vkvx_workspace_bytes(&p, &p.workspace_bytes));
    const MemoryInfo* memory;
    check(api_, GetTensorMemoryInfo(api_, beside, &memory));
    Allocator* given;
    check(api_, KernelContext_GetAllocator(api_, context, memory, &given));
    const std::unique_ptr<Allocator, Releaser> allocator(given, Releaser{api_});
    const auto free = [&](void* pointer) {
      if (Status* status = AllocatorFree(api_, given, pointer)) ReleaseStatus(api_, status);
    };
    std::unique_ptr<void, decltype(free)> workspace(nullptr, free);
    if (p.workspace_bytes) {
      check(api_,
            KernelContext_GetScratchBuffer(api_, context, memory, p.workspace_bytes, &p.workspace));
      workspace.reset(p.workspace);
      clear_workspace(p, stream);
    }
    vkvx::check(appends ? vkvx_step(&p, stream) : vkvx_attention(&p, stream));
  }

  const Api* api_;
  int32_t dtype_;
  Attributes attributes_;
};

template <class Body>
Status* guarded(const Api* api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return CreateStatus(api, kFail, (kName + std::string(": ") + error.what()).c_str());
  } catch (...) {
    return CreateStatus(api, kFail, "VisualKVAttention: unknown error");
  }
}

struct Held {
  const Api* api;
  Kernel kernel;
};

const Typed& typed(const CustomOp* op) { return *static_cast<const Typed*>(op); }

// Shapes of the outputs are those of inputs, whatever these are.
Status* infer_shapes(const CustomOp*, ShapeContext* context) {
  const Api* api = inference_api;
  return guarded(api, [&] {
    for (int i = 0; i < kOutputs; ++i) {
      TensorInfo* info;  // the context's
      check(api,
            ShapeInferContext_GetInputTypeShape(api, context, i == 0 ? 0 : kAliases[i], &info));
      check(api, ShapeInferContext_SetOutputTypeShape(api, context, i, info));
    }
  });
}

Typed custom_op(int32_t dtype, int32_t text_bits) {
  Typed op{};
  op.dtype = dtype;
  op.text_bits = text_bits;
  op.version = kMinor;
  op.GetName = [](const CustomOp*) { return kName; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return VKVX_PROVIDER; };
  op.GetInputTypeCount = [](const CustomOp*) { return size_t{kAllInputs}; };
  op.GetInputType = [](const CustomOp* self, size_t i) {
    // Behind the inputs that all nodes have come those of some, which have different types.
    if (i >= kInputs) return kUndefined;
    return type_of(input(with_text(typed(self)), static_cast<int>(i)), typed(self).dtype);
  };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) {
    return i < kInputs ? kRequired : kOptional;
  };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return kDefaultMemory; };
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t{kOutputs}; };
  op.GetOutputType = [](const CustomOp* self, size_t i) {
    return type_of(output(with_text(typed(self)), static_cast<int>(i)), typed(self).dtype);
  };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t i) {
    return i == 0 ? kRequired : kOptional;
  };
  op.CreateKernelV2 = [](const CustomOp* self, const Api* api, const KernelInfo* info,
                         void** kernel) {
    return guarded(api, [&] { *kernel = new Held{api, Kernel(api, typed(self), info)}; });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) {
    const Held& held = *static_cast<Held*>(kernel);
    return guarded(held.api, [&] { held.kernel.run(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Held*>(kernel); };
  op.InferOutputShapeFn = infer_shapes;
  return op;
}

}  // namespace

void check(const Api* api, Status* status) {
  if (status == nullptr) return;
  const std::string why = GetErrorMessage(api, status);
  ReleaseStatus(api, status);
  throw Error(why);
}

std::vector<const CustomOp*> custom_ops(const Api* api) {
  inference_api = api;
  static const std::vector<Typed> ops = [] {
    std::vector<Typed> made;
    for (const int32_t dtype : {VKVX_FLOAT16, VKVX_BFLOAT16, VKVX_FLOAT32})
      for (const int32_t text_bits : {16, 8}) made.push_back(custom_op(dtype, text_bits));
    return made;
  }();
  std::vector<const CustomOp*> pointers;
  for (const Typed& op : ops) pointers.push_back(&op);
  return pointers;
}

}  // namespace vkvx::ort
