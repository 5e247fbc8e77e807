#include <stdexcept>

#include "kernels.h"

namespace spatialprobe {

#if defined(__x86_64__)
extern const Kernels kernels_sse2, kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#else
#error "spatialprobe's grouping has kernels for x86-64 and 64-bit ARM only"
#endif

namespace {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (avx512) found.push_back(&kernels_avx512);
  if (avx2) found.push_back(&kernels_avx2);
  found.push_back(&kernels_sse2);
#else
  found.push_back(&kernels_neon);
#endif
  return found;
}

}  // namespace

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& select_kernels(const std::string& name) {
  const std::vector<const Kernels*> available = available_kernels();
  if (name == "auto") return *available.front();
  std::string choices = "auto";
  for (const Kernels* kernels : available) {
    if (name == kernels->name) return *kernels;
    choices += std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("instruction_set: wanted one of " + choices + " on this machine, got " + name);
}

}  // namespace spatialprobe
