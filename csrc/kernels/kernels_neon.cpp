#include "insert_scalar.h"
#include "lanes_neon.h"
#include "tile_kernels.h"

namespace spatialprobe {

extern const Kernels kernels_neon;
const Kernels kernels_neon = make_kernels("neon");

}  // namespace spatialprobe
