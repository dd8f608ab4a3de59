// The tile registers of AMX: sums (tokens x 16 int32) += activations (tokens x bytes) times weights (bytes x 16).
// Included beside a vector shim that has no tiles of its own. As assembly, because the intrinsics take the numbers of
// registers as text.

struct alignas(64) TileShapes {  // what LDTILECFG reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Shapes of the tiles: 0 activations, 1 weights, 2 to 5 sums. The registers are in use while this object lives.
class Tiles {
 public:
  Tiles(int tokens, int bytes) {
    TileShapes shapes;
    for (int i = 0; i < 6; i++) {
      shapes.rows[i] = (uint8_t)(i == 1 ? bytes / 4 : tokens);
      shapes.row_bytes[i] = (uint16_t)(i == 0 ? bytes : 64);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int kTile>
  static LOOKUPFFN_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static LOOKUPFFN_INLINE void load(const void* p, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static LOOKUPFFN_INLINE void store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSums>  // unsigned bytes of tile 0 times signed bytes of tile 1
  static LOOKUPFFN_INLINE void dot() {
    __asm__ volatile("tdpbusd %%tmm1, %%tmm0, %%tmm%c0" : : "i"(kSums));
  }
};
