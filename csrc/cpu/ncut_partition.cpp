// From an eigenvector to a mask.
#include <cstring>

#include "ncut.h"

namespace foveate::FOVEATE_ISA {

int ncut_component(const std::uint8_t* side, std::int64_t seed, std::int64_t h, std::int64_t w,
                   std::uint8_t* component) {
  const std::int64_t n = h * w;
  std::memset(component, 0, static_cast<std::size_t>(n));
  auto* stack = new std::int64_t[static_cast<std::size_t>(n) + 1];
  std::int64_t depth = 0;
  const auto visit = [&](std::int64_t cell) {
    if (side[cell] != 0 && component[cell] == 0) {
      component[cell] = 1;
      stack[depth++] = cell;
    }
  };
  visit(seed);
  while (depth > 0) {
    const std::int64_t cell = stack[--depth];
    if (cell >= w) visit(cell - w);
    if (cell + w < n) visit(cell + w);
    if (cell % w > 0) visit(cell - 1);
    if (cell % w + 1 < w) visit(cell + 1);
  }
  delete[] stack;
  return 0;
}

}  // namespace foveate::FOVEATE_ISA
