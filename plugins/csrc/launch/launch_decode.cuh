// Launch of one instance of the decode kernel.
#pragma once

#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

constexpr int kMostPrefetched = 4096;  // counts

template <class Engine>
constexpr int lookahead_of() {
  // More blocks on a multiprocessor hide more than deeper buffers, but for planes, which take
  // little time per tile.
  const int tiles = 256 / (Engine::kPlanes * Engine::kPaddedDim), most = Engine::kSnaps ? 1 : 4;
  return tiles < 1 ? 1 : tiles > most ? most : tiles;
}

inline int groups_of(const VkvxParams& p) {
  return p.visual_capacity ? p.visual_capacity / p.group_size : 0;
}

template <class Engine>
DecodeLayout layout_of(const VkvxParams& p, const DecodePlan& plan, int warps) {
  const int keys = Engine::kAny ? (p.key_bits < 8 ? p.key_bits : 8) : Engine::kPlanes,
            values = Engine::kAny ? (p.value_bits < 8 ? p.value_bits : 8) : Engine::kPlanes;
  return DecodeLayout(keys, values, p.head_dim, Engine::kPaddedDim, Engine::kColumns, plan.columns,
                      lookahead_of<Engine>(), plan.groups, plan.is_clustered ? plan.splits : 0,
                      warps);
}

// Warps of a block: no more than shared memory has room for.
template <class Engine>
int choose_warps(const VkvxParams& p, const DecodePlan& plan, int wanted, const Device& device) {
  int warps = min(wanted, Engine::kMostWarps);
  while (warps > 1 && layout_of<Engine>(p, plan, warps).total + 1024 > device.shared_memory)
    --warps;
  return warps;
}

template <class Engine>
void set_warps(const VkvxParams& p, int wanted, const Device& device, DecodePlan& plan) {
  plan.warps = choose_warps<Engine>(p, plan, wanted, device);
  plan.layout = layout_of<Engine>(p, plan, plan.warps);
  const int shares = plan.splits * plan.warps;
  plan.share = shares == 1 ? 0 : static_cast<unsigned>((uint64_t{1} << 32) / shares);
}

template <class Engine>
DecodePlan plan_decode(const VkvxParams& p, bool appends, const Device& device) {
  DecodePlan plan{};
  plan.appends = appends;
  const int queries = p.query_heads / p.kv_heads * p.positions;
  plan.column_tiles = (queries + Engine::kColumns - 1) / Engine::kColumns;
  plan.columns = queries < Engine::kColumns ? queries : Engine::kColumns;
  const int64_t tiles = static_cast<int64_t>(p.rows) * p.kv_heads * plan.column_tiles;
  plan.splits = choose_splits(p, tiles, device.processors);
  plan.is_clustered = is_clustered(plan.splits, device.capability);
  plan.ratio = p.query_heads / p.kv_heads;
  plan.groups = groups_of(p);
  plan.group_tiles = p.group_size / kTile;
  // Where parts have multiprocessors of their own, as many warps as there is work for.
  const bool few = have_room(p, tiles, plan.splits, device.processors);
  const int units = static_cast<int>(min(divide_up(units_of(p), plan.splits), int64_t{64}));
  plan.prefetches = few && static_cast<int64_t>(p.slots) * (plan.groups + 1) <= kMostPrefetched;
  set_warps<Engine>(p, few ? max(units, Engine::kWarps) : Engine::kWarps, device, plan);
  const Workspace workspace(p, tiles, plan.splits, plan.columns);
  plan.arrived = workspace.counters;
  plan.partial = workspace.partial;
  plan.extremes = workspace.extremes;
  return plan;
}

template <class Engine, bool kScan>
int launch_decode(const VkvxParams& p, const DecodePlan& plan, const Device& device,
                  cudaStream_t stream) {
  const int bytes = plan.layout.total;
  auto kernel = decode_kernel<Engine, kScan, lookahead_of<Engine>()>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess)
    return check_cuda("the shared memory that decode needs");
  Launch launch(device, stream);
  if (plan.is_clustered) launch.cluster(plan.splits);
  launch(kernel, dim3(plan.splits * plan.column_tiles, p.kv_heads, p.rows), plan.warps * 32, bytes,
         p, plan);
  return check_cuda("decode attention");
}

}  // namespace vkvx
