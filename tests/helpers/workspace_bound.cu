// The bound of the workspace against what calls of at most those sizes ask for: exit code 1 if one asks for more.
#include <algorithm>
#include <cstdio>
#include <random>

#include "kernels/workspace.cuh"

constexpr int kProcessors = 256;

int main() {
  std::mt19937 random(7);
  const auto pick = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(random); };
  int split = 0;
  for (int i = 0; i < 300000; ++i) {
    VkvxParams most{};
    most.kv_heads = pick(1, 32);
    most.query_heads = most.kv_heads * pick(1, 12);
    most.head_dim = 32 * pick(1, 8);
    most.rows = pick(1, pick(0, 1) ? 8 : 300);
    most.positions = pick(1, pick(0, 1) ? 8 : 2000);
    most.group_size = 128;
    most.visual_capacity = 128 * pick(0, 100);
    most.text_capacity = pick(0, 4000);
    most.correction = pick(0, 2);
    VkvxParams call = most;
    call.rows = pick(1, most.rows);
    call.positions = pick(1, pick(0, 1) ? std::min(most.positions, 8) : most.positions);
    call.visual_capacity = 128 * pick(0, most.visual_capacity / 128);
    call.text_capacity = pick(0, most.text_capacity);
    size_t needed = vkvx::Workspace(call, 0, 1, 0).bytes;
    if (call.positions <= vkvx::kMaxDecodePositions) {
      const int queries = call.query_heads / call.kv_heads * call.positions;
      const int columns = call.correction == VKVX_CORRECTION_AFFINE ? 4 * pick(1, 2) : pick(0, 1) ? 8 : pick(1, 4);  // `planes` has no affine
      const int64_t tiles = static_cast<int64_t>(call.rows) * call.kv_heads * vkvx::divide_up(queries, columns);
      const int splits = vkvx::choose_splits(call, tiles, pick(1, pick(0, 1) ? 100 : kProcessors));
      split += splits > 1;
      needed = vkvx::Workspace(call, tiles, splits, 8).bytes;
    }
    if (needed > vkvx::workspace_bound(most, kProcessors)) {
      std::printf("%d rows, %d positions: %zu bytes needed, the bound is %zu\n", call.rows, call.positions, needed, vkvx::workspace_bound(most, kProcessors));
      return 1;
    }
  }
  if (split < 10000) return std::printf("only %d calls were split\n", split), 1;
}
