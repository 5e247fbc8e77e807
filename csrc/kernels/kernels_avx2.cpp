#include "insert_avx2.h"
#include "lanes_avx2.h"
#include "tile_kernels.h"

namespace spatialprobe {

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = make_kernels("avx2");

}  // namespace spatialprobe
