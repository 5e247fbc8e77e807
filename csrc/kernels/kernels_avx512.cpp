#include "insert_avx2.h"
#include "lanes_avx512.h"
#include "tile_kernels.h"

namespace spatialprobe {

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = make_kernels("avx512");

}  // namespace spatialprobe
