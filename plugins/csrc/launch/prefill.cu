// Which calls prefill takes, and the way to the instance of their head dim.
#include "../kernels/prefill.cuh"
#include "../kernels/workspace.cuh"
#include "internal.h"

namespace vkvx {

bool prefill_takes(const VkvxParams& p, const Device& device) {
  const bool aligned = rows_are_aligned(p.key, p.key_stride) &&
                       rows_are_aligned(p.value, p.value_stride) &&
                       rows_are_aligned(p.query, p.query_stride);
  // The greatest score is that of the greatest product only if the scale is positive.
  return device.capability >= 80 && p.dtype != VKVX_FLOAT32 && p.scale > 0.0f && aligned &&
         (p.head_dim <= 256 || p.head_dim == 512) && p.positions <= kPrefillMaxPositions &&
         prefill_shared_bytes(p.head_dim, p.positions, !is_plain(p)) <= device.shared_memory;
}

int prefill(const VkvxParams& p, cudaStream_t stream) {
  const Workspace workspace(p, 0, 1, 0);
  rank_tokens(p, workspace.rank, workspace.run_end, stream);
  switch (p.head_dim) {
    case 32:
      return prefill_heads<32>(p, workspace.rank, workspace.run_end, stream);
    case 64:
      return prefill_heads<64>(p, workspace.rank, workspace.run_end, stream);
    case 96:
      return prefill_heads<96>(p, workspace.rank, workspace.run_end, stream);
    case 128:
      return prefill_heads<128>(p, workspace.rank, workspace.run_end, stream);
    case 160:
      return prefill_heads<160>(p, workspace.rank, workspace.run_end, stream);
    case 192:
      return prefill_heads<192>(p, workspace.rank, workspace.run_end, stream);
    case 224:
      return prefill_heads<224>(p, workspace.rank, workspace.run_end, stream);
    case 256:
      return prefill_heads<256>(p, workspace.rank, workspace.run_end, stream);
    default:
      return prefill_heads<512>(p, workspace.rank, workspace.run_end, stream);
  }
}

}  // namespace vkvx
