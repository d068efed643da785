#include "../kernels/decode_planes.cuh"
#include "launch_decode.cuh"

namespace vkvx {

namespace {

template <int kBits, int kQueries>
int launch(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  using Engine = PlanesEngine<kBits, kQueries>;
  return launch_decode<Engine, false>(p, plan_decode<Engine>(p, device), device, stream);
}

}  // namespace

int decode_planes(const VkvxParams& p, const Device& device, cudaStream_t stream) {
  const int queries = p.query_heads / p.kv_heads * p.positions;
  if (p.key_bits == 1 && p.value_bits == 1) {
    if (queries == 1) return launch<1, 1>(p, device, stream);
    if (queries == 2) return launch<1, 2>(p, device, stream);
    return launch<1, 4>(p, device, stream);
  }
  if (p.key_bits == 2) return launch<2, 1>(p, device, stream);
  return launch<4, 1>(p, device, stream);
}

}  // namespace vkvx
