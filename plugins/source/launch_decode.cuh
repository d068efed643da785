// Launch of one instance of the decode kernel.
#pragma once

#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

template <class Engine>
constexpr int lookahead_of() {
  // More blocks on a multiprocessor hide more than deeper buffers, but for planes, which take little time a tile.
  const int tiles = 512 / ((Engine::kKeyPlanes + Engine::kValuePlanes) * Engine::kHeadDim);
  const int most = Engine::kColumns == 8 ? 1 : 4;
  return tiles < 1 ? 1 : tiles > most ? most : tiles;
}

template <class Engine>
DecodePlan plan_decode(const VkvxParams& p, const Device& device) {
  DecodePlan plan{};
  const int queries = p.query_heads / p.kv_heads * p.positions;
  plan.column_tiles = (queries + Engine::kColumns - 1) / Engine::kColumns;
  const int most = queries < Engine::kColumns ? queries : Engine::kColumns;
  plan.columns = most + (most & 1);
  plan.lookahead = lookahead_of<Engine>();
  const int64_t tiles = static_cast<int64_t>(p.rows) * p.kv_heads * plan.column_tiles;
  plan.splits = choose_splits(p, tiles, device.processors);
  const Workspace workspace(p, tiles, plan.splits, plan.columns);
  plan.arrived = workspace.counters;
  plan.partial = workspace.partial;
  plan.extremes = workspace.extremes;
  return plan;
}

template <class Engine, bool kScan>
int launch_decode(const VkvxParams& p, const DecodePlan& plan, const Device& device, cudaStream_t stream) {
  constexpr int kLookahead = lookahead_of<Engine>();
  const int groups = p.visual_capacity ? p.visual_capacity / p.group_size : 0;
  const DecodeLayout layout(Engine::kKeyPlanes, Engine::kValuePlanes, Engine::kHeadDim, Engine::kColumns, plan.columns, kLookahead, groups);
  auto kernel = decode_kernel<Engine, kScan, kLookahead>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.total) != cudaSuccess)
    return check_cuda("the shared memory that decode needs");
  const dim3 grid(plan.splits * plan.column_tiles, p.kv_heads, p.rows);
  kernel<<<grid, kWarps * 32, layout.total, stream>>>(p, plan);
  return check_cuda("decode attention");
}

}  // namespace vkvx
