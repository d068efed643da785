// Launch of one instance of the decode kernel.
#pragma once

#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

template <class Engine>
constexpr int lookahead_of() {
  // More blocks on a multiprocessor hide more than deeper buffers, but for planes, which take
  // little time per tile.
  const int tiles = 256 / (Engine::kPlanes * Engine::kPaddedDim), most = Engine::kSnaps ? 1 : 4;
  return tiles < 1 ? 1 : tiles > most ? most : tiles;
}

template <class Engine>
DecodeLayout layout_of(const VkvxParams& p, int columns, int warps) {
  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0;
  const int keys = Engine::kAny ? (p.key_bits < 8 ? p.key_bits : 8) : Engine::kPlanes,
            values = Engine::kAny ? (p.value_bits < 8 ? p.value_bits : 8) : Engine::kPlanes;
  return DecodeLayout(keys, values, p.head_dim, Engine::kPaddedDim, Engine::kColumns, columns,
                      lookahead_of<Engine>(), groups, warps);
}

// Warps of a block: no more than shared memory has room for.
template <class Engine>
int choose_warps(const VkvxParams& p, int columns, const Device& device) {
  int warps = Engine::kWarps;
  while (warps > 1 && layout_of<Engine>(p, columns, warps).total + 1024 > device.shared_memory)
    --warps;
  return warps;
}

template <class Engine>
DecodePlan plan_decode(const VkvxParams& p, const Device& device) {
  DecodePlan plan{};
  const int queries = p.query_heads / p.kv_heads * p.positions;
  plan.column_tiles = (queries + Engine::kColumns - 1) / Engine::kColumns;
  plan.columns = queries < Engine::kColumns ? queries : Engine::kColumns;
  const int64_t tiles = static_cast<int64_t>(p.rows) * p.kv_heads * plan.column_tiles;
  plan.splits = choose_splits(p, tiles, device.processors);
  plan.warps = choose_warps<Engine>(p, plan.columns, device);
  const Workspace workspace(p, tiles, plan.splits, plan.columns);
  plan.arrived = workspace.counters;
  plan.partial = workspace.partial;
  plan.extremes = workspace.extremes;
  return plan;
}

template <class Engine, bool kScan>
int launch_decode(const VkvxParams& p, const DecodePlan& plan, const Device& device,
                  cudaStream_t stream) {
  const DecodeLayout layout = layout_of<Engine>(p, plan.columns, plan.warps);
  auto kernel = decode_kernel<Engine, kScan, lookahead_of<Engine>()>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.total) !=
      cudaSuccess)
    return check_cuda("the shared memory that decode needs");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.splits * plan.column_tiles, p.kv_heads, p.rows);
  config.blockDim = dim3(plan.warps * 32);
  config.dynamicSmemBytes = layout.total;
  config.stream = stream;
  // The kernel may start before the one ahead of it on the stream has ended; it waits itself.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = device.capability >= 90 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, p, plan);
  return check_cuda("decode attention");
}

}  // namespace vkvx
