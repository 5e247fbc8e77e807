#include "insert_scalar.h"
#include "lanes_sse2.h"
#include "tile_kernels.h"

namespace spatialprobe {

extern const Kernels kernels_sse2;
const Kernels kernels_sse2 = make_kernels("sse2");

}  // namespace spatialprobe
