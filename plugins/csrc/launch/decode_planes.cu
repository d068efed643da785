#include "../kernels/decode_planes.cuh"
#include "launch_decode.cuh"

namespace vkvx {

namespace {

template <int kBits, int kQueries>
int launch(const VkvxParams& p, const Device& device, bool appends, cudaStream_t stream) {
  using Engine = PlanesEngine<kBits, kQueries>;
  return launch_decode<Engine, false>(p, plan_decode<Engine>(p, appends, device), device, stream);
}

}  // namespace

int decode_planes(const VkvxParams& p, const Device& device, bool appends, cudaStream_t stream) {
  if (p.key_bits == 1) {
    switch (planes_columns(p)) {
      case 1:
        return launch<1, 1>(p, device, appends, stream);
      case 2:
        return launch<1, 2>(p, device, appends, stream);
      default:
        return launch<1, 4>(p, device, appends, stream);
    }
  }
  if (p.key_bits == 2) return launch<2, 1>(p, device, appends, stream);
  return launch<4, 1>(p, device, appends, stream);
}

}  // namespace vkvx
