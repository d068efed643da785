// Launch of decode attention of few rows.
#include "../kernels/few.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

namespace {

constexpr int kMostCounts = 2048;         // of all slots
constexpr int kStaticMemory = 16 * 1024;  // shared memory of the kernel besides what is laid out

int64_t blocks_of(const VkvxParams& p) {  // for each part
  return static_cast<int64_t>(p.rows) * p.kv_heads *
         divide_up(p.query_heads / p.kv_heads, kFewColumns);
}

// A power of two: as many parts as have multiprocessors of their own, or are asked for.
int parts_of(const VkvxParams& p, const Device& device) {
  int parts = 1;
  while (parts < kMostOfCluster &&
         (2 * parts <= p.splits || have_room(p, blocks_of(p), 2 * parts, device.processors)))
    parts *= 2;
  return parts;
}

FewPlan plan_few(const VkvxParams& p, bool appends, const Device& device) {
  FewPlan plan{};
  plan.parts = parts_of(p, device);
  while (1 << plan.part_bits < plan.parts) ++plan.part_bits;
  plan.ratio = p.query_heads / p.kv_heads;
  plan.groups = p.visual_capacity / p.group_size;
  plan.group_tiles = p.group_size / kTile;
  plan.reciprocal = ((1u << 31) + plan.group_tiles - 1) / plan.group_tiles;
  // At a time what a part has, but no more than 64 KB of codes and of rows.
  const auto share = [&](int n) { return (n + plan.parts - 1) / plan.parts; };
  plan.tiles = min(share(p.visual_capacity / kTile), min(8, 32 / (p.key_bits + p.value_bits)));
  plan.rows = min(kTile, share(p.text_capacity / kRowsAtOnce + 1) * kRowsAtOnce + 31 & ~31);
  const int64_t all = static_cast<int64_t>(p.slots) * plan.groups;
  plan.reads_all = all <= kMostCounts && p.slots <= kFewThreads;
  plan.appends = appends;
  plan.layout = FewLayout(plan.reads_all ? static_cast<int>(all) : plan.groups, plan.tiles,
                          plan.rows, p.key_bits, p.value_bits);
  return plan;
}

// Whether parts have multiprocessors of their own, and get all that they may have at a time, or at
// two times if there are as many as can be.
bool are_few(const VkvxParams& p, const FewPlan& plan) {
  const int taken = plan.parts == kMostOfCluster ? 2 * plan.parts : plan.parts;
  return plan.parts > 1 && plan.tiles * taken * kTile >= p.visual_capacity &&
         plan.rows * taken > p.text_capacity;
}

}  // namespace

bool few_takes(const VkvxParams& p, const Device& device) {
  if (!decode_takes(p, device, VKVX_CODES) || device.capability < 90 || !is_plain(p) ||
      p.positions != 1 || p.text_entries != 1 || p.visual_entries || p.head_dim != kFewDim ||
      p.key_bits == 16 || p.correction == VKVX_CORRECTION_AFFINE ||
      p.visual_capacity / kTile > 65536 || p.visual_capacity / p.group_size > kMostCounts)
    return false;
  const FewPlan plan = plan_few(p, false, device);
  return plan.layout.total + kStaticMemory <= device.shared_memory &&
         (p.kernel == VKVX_FEW || are_few(p, plan));
}

int few(const VkvxParams& p, const Device& device, bool appends, cudaStream_t stream) {
  const FewPlan plan = plan_few(p, appends, device);
  const auto kernel = p.dtype == VKVX_BFLOAT16 ? few_kernel<true> : few_kernel<false>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           plan.layout.total) != cudaSuccess)
    return check_cuda("the shared memory that decode needs");
  Launch launch(device, stream);
  launch.cluster(plan.parts);
  launch(kernel, dim3(plan.parts * divide_up(plan.ratio, kFewColumns), p.kv_heads, p.rows),
         kFewThreads, plan.layout.total, p, plan);
  return check_cuda("decode attention");
}

}  // namespace vkvx
