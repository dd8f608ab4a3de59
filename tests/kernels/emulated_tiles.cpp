// The projection on tiles, with AMX's registers in plain C++: no machine with AMX is needed to test its loops.
#include <cstring>

#include "kernels/kernels.h"

#define LOOKUPFFN_TILES
namespace lookupffn {
namespace emulated_tiles {
#include "simd/scalar.h"

class Tiles {  // as in csrc/simd/tiles_amx.h; TILELOADD and TDPBUSD as Intel's manual has them
 public:
  Tiles(int tokens, int bytes) {
    std::memset(tile, 0xa5, sizeof tile);  // what was there before is nobody's business
    for (int i = 0; i < 6; i++) rows[i] = i == 1 ? bytes / 4 : tokens, row_bytes[i] = i == 0 ? bytes : 64;
    if (tokens < 1 || tokens > 16 || bytes < 4 || bytes > 64 || bytes % 4) __builtin_trap();  // LDTILECFG would fault
  }
  Tiles(const Tiles&) = delete;

  template <int kTile>
  static void zero() {
    std::memset(tile[kTile], 0, sizeof tile[kTile]);
  }
  template <int kTile>
  static void load(const void* p, size_t stride) {
    zero<kTile>();
    for (int r = 0; r < rows[kTile]; r++) std::memcpy(tile[kTile][r], (const uint8_t*)p + r * stride, row_bytes[kTile]);
  }
  template <int kTile>
  static void store(void* p, size_t stride) {
    for (int r = 0; r < rows[kTile]; r++) std::memcpy((uint8_t*)p + r * stride, tile[kTile][r], row_bytes[kTile]);
  }
  template <int kSums>
  static void dot() {
    for (int m = 0; m < rows[kSums]; m++)
      for (int k = 0; k < row_bytes[0] / 4; k++)
        for (int n = 0; n < 16; n++) {
          uint32_t sum;
          std::memcpy(&sum, tile[kSums][m] + 4 * n, 4);
          for (int i = 0; i < 4; i++) sum += (uint32_t)(tile[0][m][4 * k + i] * (int8_t)tile[1][k][4 * n + i]);
          std::memcpy(tile[kSums][m] + 4 * n, &sum, 4);
        }
  }

 private:
  static thread_local uint8_t tile[8][16][64];
  static thread_local int rows[8], row_bytes[8];
};
thread_local uint8_t Tiles::tile[8][16][64];
thread_local int Tiles::rows[8], Tiles::row_bytes[8];

#include "kernels/loops-inl.h"
}  // namespace emulated_tiles
}  // namespace lookupffn

LOOKUPFFN_EXPORT(emulated_tiles)
