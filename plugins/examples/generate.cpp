// Runs a decoder engine of vkvx: prefill of saved prompts, then greedy decoding. README.md says how
// to get engine, plugin and input file.
#include <NvInferRuntime.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>

#if NV_TENSORRT_MAJOR != 8
#include <cuda_bf16.h>
#endif

#include "npz.h"

using nvinfer1::DataType;
using nvinfer1::Dims;

namespace {

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", text);
  }
} logger;

[[noreturn]] void fail(const std::string& text) { throw std::runtime_error(text); }

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}

size_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
    case DataType::kINT32:
      return 4;
    case DataType::kHALF:
      return 2;
#if NV_TENSORRT_MAJOR != 8
    case DataType::kBF16:
      return 2;
#endif
    default:
      fail("the engine has a tensor of a type that vkvx does not use");
  }
}

int64_t volume(const Dims& dims) {
  int64_t n = 1;
  for (int i = 0; i < dims.nbDims; ++i) n *= dims.d[i];
  return n;
}

template <class... Extents>
Dims dims_of(Extents... extents) {
  Dims dims{};
  dims.nbDims = sizeof...(extents);
  int i = 0;
  ((dims.d[i++] = extents), ...);
  return dims;
}

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// An engine, one context, and a device buffer for each tensor. Caches are updated in place: outputs
// present.* have the memory of past.*.
class Decoder {
 public:
  Decoder(const std::string& engine_path, const std::string& plugin_path)
      : runtime_(nvinfer1::createInferRuntime(logger)) {
    if (!runtime_) fail("TensorRT does not start; its version has to be that of the headers");
    if (runtime_->getPluginRegistry().loadLibrary(plugin_path.c_str()) == nullptr)
      fail("cannot load the plugin " + plugin_path);
    const std::vector<char> plan = read_file(engine_path);
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine_) fail("cannot load the engine " + engine_path);
    context_.reset(engine_->createExecutionContext());
    if (!context_) fail("no memory for the engine's activations");
    check(cudaStreamCreate(&stream_));
    for (int i = 0; i < engine_->getNbIOTensors(); ++i)
      names_.push_back(engine_->getIOTensorName(i));
  }

  ~Decoder() {
    cudaStreamSynchronize(stream_);
    for (const auto& [name, buffer] : buffers_) cudaFree(buffer);
    cudaStreamDestroy(stream_);
  }

  // The largest size of an axis that a profile takes.
  int64_t most(const char* name, int axis) const {
    int64_t extent = 0;
    for (int i = 0; i < engine_->getNbOptimizationProfiles(); ++i)
      extent = std::max<int64_t>(
          extent, engine_->getProfileShape(name, i, nvinfer1::OptProfileSelector::kMAX).d[axis]);
    return extent;
  }

  // Buffers of empty caches: slots sequences of so many groups of pictures and text rows.
  void allocate_caches(int slots, int groups, int group_size, int text_rows) {
    for (const std::string& name : names_) {
      if (name.rfind("past.", 0) != 0) continue;
      Dims dims = engine_->getTensorShape(name.c_str());
      const bool text = name.find(".text_") != std::string::npos,
                 params = name.find("_params") != std::string::npos;
      dims.d[0] = slots;
      dims.d[2] = text ? text_rows : params ? groups : groups * group_size / 128;
      shapes_[name] = dims;
      allocate(name, dims);
    }
    for (const auto& [name, dims] : {std::pair{"visual_count", dims_of(slots, groups)},
                                     std::pair{"text_count", dims_of(slots)}}) {
      put(name, dims, std::vector<int32_t>(volume(dims)).data());
      allocate(name + std::string("_out"), dims);
    }
  }

  // Sets an input from host memory; floats become the type of the engine.
  template <class T>
  void put(const std::string& name, const Dims& dims, const T* values) {
    shapes_[name] = dims;
    allocate(name, dims);
    const void* source = values;
    std::vector<uint16_t> small;
    if constexpr (std::is_same_v<T, float>) {
      const DataType type = engine_->getTensorDataType(name.c_str());
      if (bytes_of(type) == 2) {
        small.resize(volume(dims));
        for (size_t i = 0; i < small.size(); ++i) {
#if NV_TENSORRT_MAJOR != 8
          if (type == DataType::kBF16) {
            small[i] = __bfloat16_as_ushort(__float2bfloat16(values[i]));
            continue;
          }
#endif
          small[i] = __half_as_ushort(__float2half(values[i]));
        }
        source = small.data();
      }
    }
    const size_t bytes = volume(dims) * bytes_of(engine_->getTensorDataType(name.c_str()));
    check(cudaMemcpyAsync(buffers_[name], source, bytes, cudaMemcpyHostToDevice, stream_));
    check(cudaStreamSynchronize(stream_));  // the host memory may go away
  }

  // Whether a profile takes the shapes that are set; the first that does is used.
  bool choose_profile() {
    for (int i = 0; i < engine_->getNbOptimizationProfiles(); ++i) {
      bool fits = true;
      for (const auto& [name, dims] : shapes_) {
        const Dims least =
            engine_->getProfileShape(name.c_str(), i, nvinfer1::OptProfileSelector::kMIN);
        const Dims most =
            engine_->getProfileShape(name.c_str(), i, nvinfer1::OptProfileSelector::kMAX);
        for (int axis = 0; axis < dims.nbDims; ++axis)
          fits = fits && least.d[axis] <= dims.d[axis] && dims.d[axis] <= most.d[axis];
      }
      if (!fits) continue;
      if (i != profile_ && !context_->setOptimizationProfileAsync(i, stream_))
        fail("cannot switch the profile");
      profile_ = i;
      return true;
    }
    return false;
  }

  // One call. The chosen token of each row: that of the largest logit.
  std::vector<int32_t> step(int rows) {
    for (const auto& [name, dims] : shapes_)
      if (!context_->setInputShape(name.c_str(), dims))
        fail("the engine does not take the shape of " + name);
    for (const std::string& name : names_) {
      const bool in_place = name.rfind("present.", 0) == 0;
      if (name == "logits") allocate(name, context_->getTensorShape("logits"));
      void* buffer = buffers_[in_place ? "past." + name.substr(8) : name];
      if (buffer == nullptr || !context_->setTensorAddress(name.c_str(), buffer))
        fail("no buffer for " + name);
    }
    if (!context_->enqueueV3(stream_)) fail("the engine does not run");
    // The layers read the counts, so these become the new ones only now.
    for (const std::string name : {"visual_count", "text_count"})
      check(cudaMemcpyAsync(buffers_[name], buffers_[name + "_out"], volume(shapes_[name]) * 4,
                            cudaMemcpyDeviceToDevice, stream_));
    const int64_t words = volume(context_->getTensorShape("logits")) / rows;
    std::vector<float> logits(rows * words);
    check(cudaMemcpyAsync(logits.data(), buffers_["logits"], logits.size() * 4,
                          cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    std::vector<int32_t> tokens(rows);
    for (int b = 0; b < rows; ++b) {
      const auto first = logits.begin() + b * words;
      tokens[b] = static_cast<int32_t>(std::max_element(first, first + words) - first);
    }
    return tokens;
  }

 private:
  void allocate(const std::string& name, const Dims& dims) {
    const size_t bytes =
        std::max<int64_t>(volume(dims), 1) *
        bytes_of(engine_->getTensorDataType(name.c_str()));  // no null for empty tensors
    if (bytes <= sizes_[name]) return;
    if (void* old = std::exchange(buffers_[name], nullptr)) check(cudaFree(old));
    check(cudaMalloc(&buffers_[name], bytes));
    sizes_[name] = bytes;
  }

  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
  int profile_ = 0;
  std::vector<std::string> names_;
  std::map<std::string, Dims> shapes_;  // of the inputs
  std::map<std::string, void*> buffers_;
  std::map<std::string, size_t> sizes_;
};

void generate(const std::string& engine_path, const std::string& plugin_path,
              const std::string& input_path, int tokens) {
  std::map<std::string, Array> saved = npz::read(input_path);
  for (const char* name : {"input_ids", "position_ids", "visual_embeds", "visual_index",
                           "text_index", "last_index", "slot"})
    if (saved.count(name) == 0) fail(input_path + " has no array " + name);
  const auto ints = [&](const char* name) { return saved[name].as<int32_t>("<i4"); };
  const auto extent = [&](const char* name, int axis) {
    return static_cast<int>(saved[name].shape.at(axis));
  };
  const int rows = extent("input_ids", 0), positions = extent("input_ids", 1),
            hidden = extent("visual_embeds", 2);
  const int visual = extent("visual_index", 1), text = extent("text_index", 1),
            slots = 1 + *std::max_element(ints("slot"), ints("slot") + rows);

  Decoder decoder(engine_path, plugin_path);
  // At 16 bits the visual cache is empty, and the tokens of pictures lie among the text rows.
  const int64_t most_groups = decoder.most("visual_count", 1);
  const int group_size =
      most_groups ? static_cast<int>(decoder.most("past.0.visual_key", 2) * 128 / most_groups) : 0;
  const int groups = group_size ? std::max(1, visual / group_size) : 0,
            text_rows = (group_size ? text : positions) + tokens;
  if (groups > most_groups || text_rows > decoder.most("past.0.text_key", 2))
    fail("the engine has room for " + std::to_string(most_groups * group_size) + " visual and " +
         std::to_string(decoder.most("past.0.text_key", 2)) +
         " text tokens per slot; this run needs " + std::to_string(groups * group_size) + " and " +
         std::to_string(text_rows));
  decoder.allocate_caches(slots, groups, group_size, text_rows);

  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  decoder.put("input_ids", dims_of(rows, positions), ints("input_ids"));
  decoder.put("position_ids", dims_of(rows, positions), ints("position_ids"));
  decoder.put("visual_embeds", dims_of(rows, visual, hidden),
              saved["visual_embeds"].as<float>("<f4"));
  decoder.put("visual_index", dims_of(rows, visual), ints("visual_index"));
  decoder.put("text_index", dims_of(rows, text), ints("text_index"));
  decoder.put("last_index", dims_of(rows), ints("last_index"));
  decoder.put("slot", dims_of(rows), ints("slot"));
  if (!decoder.choose_profile())
    fail("no profile of the engine takes the saved prompts; build it for larger ones");
  std::vector<std::vector<int32_t>> answers(rows);
  std::vector<int32_t> chosen = decoder.step(rows), position(rows), zeros(rows);
  for (int b = 0; b < rows; ++b)
    position[b] = ints("position_ids")[b * positions + ints("last_index")[b]];
  const auto prefilled = Clock::now();

  // Decode: one position per row and no picture. An engine that takes no empty tensors gets one
  // group of padding.
  decoder.put("text_index", dims_of(rows, 1), zeros.data());
  decoder.put("last_index", dims_of(rows), zeros.data());
  decoder.put("input_ids", dims_of(rows, 1), chosen.data());
  decoder.put("position_ids", dims_of(rows, 1), position.data());
  for (const int entries : {0, group_size}) {
    decoder.put("visual_index", dims_of(rows, entries),
                std::vector<int32_t>(rows * entries + 1, -1).data());
    decoder.put("visual_embeds", dims_of(rows, entries, hidden),
                std::vector<float>(int64_t{rows} * entries * hidden + 1).data());
    if (decoder.choose_profile()) break;
    if (entries == group_size)
      fail("no profile of the engine takes decode steps of " + std::to_string(rows) + " rows");
  }
  for (int n = 0; n < tokens; ++n) {
    for (int b = 0; b < rows; ++b) answers[b].push_back(chosen[b]), ++position[b];
    if (n + 1 == tokens) break;
    decoder.put("input_ids", dims_of(rows, 1), chosen.data());
    decoder.put("position_ids", dims_of(rows, 1), position.data());
    chosen = decoder.step(rows);
  }
  const auto done = Clock::now();

  for (const auto& answer : answers) {
    for (size_t i = 0; i < answer.size(); ++i) std::printf("%s%d", i ? " " : "", answer[i]);
    std::printf("\n");
  }
  const auto milliseconds = [](auto from, auto to) {
    return std::chrono::duration<double, std::milli>(to - from).count();
  };
  std::fprintf(stderr, "prefill %.2f ms, decode %.3f ms a step\n", milliseconds(start, prefilled),
               milliseconds(prefilled, done) / std::max(1, tokens - 1));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::fprintf(stderr,
                 "usage: %s ENGINE PLUGIN INPUTS.npz [TOKENS]\nprints the token ids of each row's "
                 "answer, 32 unless TOKENS says otherwise\n",
                 argv[0]);
    return 2;
  }
  try {
    const int tokens = argc == 5 ? std::atoi(argv[4]) : 32;
    if (tokens < 1) fail("TOKENS has to be a number of at least 1");
    generate(argv[1], argv[2], argv[3], tokens);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}
