// Packed layers that are damaged: refused, or run within their own bytes.
#include "groups.h"
#include "layers.h"

namespace {

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (int i = 0; i < 36; i++) {
    Case c = {};
    c.weights = WeightType(i % 3);
    c.tables = TableType(i / 3 % 4);
    c.stages = i / 12 == 2 ? 4 : i / 12;
    c.code_bits = 1 + i % 4;
    c.num_tables = i % 2 ? 3 : 17;
    c.reads = std::min(1 + i % 4, 1 << c.code_bits);
    c.out_features = i % 5 ? 3 : 65;
    c.slice = (i % 3 ? 64 : 128) * (c.tables == TableType::kInt4 ? 2 : 1);
    const int codes = c.num_tables * c.code_bits;
    c.repeats = c.blocks = 1;
    c.in_features = codes;
    if (c.stages) {
      c.blocks = 2;
      c.block_in = c.block_out = 16;
      c.repeats = (codes + 31) / 32;
      c.in_features = 30;
    }
    cases.push_back(c);
  }
  return cases;
}

}  // namespace

// One field of the header changed: each of these must be refused, whatever the layer.
std::string test_refusals(const Options& options) {
  Random random = {options.seed ^ 0x72656675};
  constexpr int kMost = std::numeric_limits<int>::max();
  int refused = 0;
  for (const Case& c : small_cases()) {
    set_case(c.name());
    const Packed good = pack(c, random);
    const PackedHeader& h = good.l.h;
    const auto must_refuse = [&](const char* what, size_t at, const void* value, size_t size) {
      Guarded bytes(good.bytes->size());
      memcpy(bytes.data(), good.bytes->data(), bytes.size());
      memcpy(bytes.data() + at, value, size);
      Layer l;
      EXPECT(!open_layer(bytes.data(), bytes.size(), &l).empty(), "a layer with another %s is taken", what);
      refused++;
    };
#define REFUSE(type, field, ...)                                    \
  for (const type value : std::initializer_list<type>{__VA_ARGS__}) \
    must_refuse(#field, offsetof(PackedHeader, field), &value, sizeof value);
    REFUSE(uint32_t, version, 0, 2, 0xffffffff)
    REFUSE(int, in_features, 0, -1, kMost, 1 << 25)
    REFUSE(int, out_features, 0, -1, 1000, kMost, kMost - 62)
    REFUSE(int, num_tables, 0, -1, h.num_tables + 16, kMost)
    REFUSE(int, code_bits, 0, -1, 17, kMost)
    REFUSE(int, reads, 0, -1, 5, kMost)
    REFUSE(int, stages, -1, 2, 3, 5, kMost)
    REFUSE(int, table_rows, 0, -1, 3 * (1 << h.code_bits), kMost)
    REFUSE(int, weight_type, -1, 3)
    REFUSE(int, table_type, -1, 4)
    REFUSE(int, slice, 0, -64, 32, 96, 512, kMost, c.tables == TableType::kInt4 ? 64 : 256)
    REFUSE(int, reserved, 1, -1)
    REFUSE(float, scale, kNaN, kInfinity)
    REFUSE(float, residual, kNaN, -kInfinity)
    REFUSE(uint64_t, total_bytes, 0, h.total_bytes - 1, h.total_bytes + 64, ~uint64_t(0))
    REFUSE(uint64_t, offset[kBias], 32, h.total_bytes, h.total_bytes - 64 * 3, ~uint64_t(0), ~uint64_t(63))
    REFUSE(uint64_t, offset[kTables], h.total_bytes, ~uint64_t(63))
    if (!c.stages) REFUSE(int, repeats, 0, 2, kMost)  // repeats would be shared out among threads
    if (c.stages) {
      REFUSE(int, repeats, 0, -1, kMost, 1 << 20)
      REFUSE(int, blocks, 0, 3, -2, 1 << 30)
      REFUSE(int, block_in, 0, 8, 24, -16, kMost - 15)
      REFUSE(int, block_out, 0, 8, 24, -16, kMost - 15)
      if (c.weights != WeightType::kFloat32)
        for (const float level : {0.0f, -1.0f, kNaN, kInfinity, c.weights == WeightType::kInt8 ? 128.0f : 32768.0f})
          must_refuse("level", h.offset[kLevels], &level, 4);
    }
#undef REFUSE
    for (size_t i = 0; i < 8; i++) must_refuse("magic", i, "?", 1);
    std::vector<size_t> sizes = {h.total_bytes - 1, h.total_bytes - 64};
    for (size_t n = 0; n <= sizeof h; n++) sizes.push_back(n);
    for (size_t n : sizes) {  // truncated, and truncated with a header that agrees
      Guarded bytes(n);
      memcpy(bytes.data(), good.bytes->data(), n);
      Layer l;
      EXPECT(!open_layer(bytes.data(), n, &l).empty(), "%zu of %zu bytes are taken", n, good.bytes->size());
      const uint64_t total = n;
      if (n >= sizeof h) memcpy(bytes.data() + offsetof(PackedHeader, total_bytes), &total, 8);
      EXPECT(!open_layer(bytes.data(), n, &l).empty(), "%zu of %zu bytes are taken", n, good.bytes->size());
      refused += 2;
    }
    Guarded longer(good.bytes->size() + 64);  // and a header that agrees
    memset(longer.data(), 0, longer.size());
    memcpy(longer.data(), good.bytes->data(), good.bytes->size());
    const uint64_t total = longer.size();
    memcpy(longer.data() + offsetof(PackedHeader, total_bytes), &total, 8);
    Layer l;
    EXPECT(!open_layer(longer.data(), longer.size(), &l).empty(), "64 bytes too many are taken");
    refused++;
  }
  return text("%d damaged layers refused", refused);
}

// Random damage to the header, to the numbers behind it, or both: refused, or a layer that runs within its own bytes.
std::string test_damage(const Options& options) {
  Random random = {options.seed ^ 0x64616d61};
  std::vector<Packed> layers;
  for (const Case& c : small_cases()) layers.push_back(pack(c, random));
  const std::vector<const Kernels*> implementations = running_here();
  const int count = options.is_long ? 400000 : 20000;
  int taken = 0;
  for (int i = 0; i < count; i++) {
    const Guarded& good = *layers[random.below(int(layers.size()))].bytes;
    size_t size = good.size();
    uint8_t header[sizeof(PackedHeader)];
    memcpy(header, good.data(), sizeof header);
    for (int changes = random.between(1, 3); changes > 0; changes--) {
      const int field = 12 + 4 * random.below(int(sizeof header - 12) / 4);
      const int interesting = random.pick({-1,
                                           0,
                                           1,
                                           2,
                                           3,
                                           4,
                                           8,
                                           15,
                                           16,
                                           17,
                                           32,
                                           48,
                                           64,
                                           128,
                                           1 << 16,
                                           1 << 24,
                                           1 << 30,
                                           (1 << 30) + (1 << 29),
                                           std::numeric_limits<int>::max(),
                                           std::numeric_limits<int>::min()});
      const uint64_t offset = 64 * uint64_t(random.below(int(size / 64) + 2));
      switch (random.below(5)) {
        case 0: header[random.below(sizeof header)] ^= uint8_t(1 << random.below(8)); break;
        case 1: header[12 + random.below(sizeof header - 12)] = uint8_t(random.next()); break;
        case 2: memcpy(header + field, &interesting, 4); break;
        case 3: memcpy(header + offsetof(PackedHeader, offset) + 8 * random.below(kSections), &offset, 8); break;
        default:  // shorter, and the header agrees
          size = random.one_in(4) ? size - random.below(int(size) - int(sizeof header)) : size;
          const uint64_t total = size;
          memcpy(header + offsetof(PackedHeader, total_bytes), &total, 8);
      }
    }
    Guarded bytes(round_up(size, 64));  // rounded, so that it begins at a cache line
    memset(bytes.data(), 0, bytes.size());
    memcpy(bytes.data(), good.data(), size);
    if (random.one_in(2)) memcpy(bytes.data(), header, sizeof header);
    for (int changes = random.pick({0, 0, 1, 100}); changes > 0; changes--) {
      const size_t at = sizeof header + random.below(int(bytes.size() - sizeof header));
      bytes.data()[at] = random.pick({uint8_t(random.next()), uint8_t(0x7f), uint8_t(0x80), uint8_t(0xff)});
    }
    std::string name = text("seed %llu, damaged layer %d:", static_cast<unsigned long long>(options.seed), i);
    for (size_t at = 0; at < sizeof header; at += 4)
      name += text(" %d", reinterpret_cast<const int*>(bytes.data() + at)[0]);
    set_case(name);
    Layer l;
    if (!open_layer(bytes.data(), size, &l).empty()) continue;
    taken++;
    const int tokens = random.between(1, 3);
    const Input in = make_input(tokens, l.h.in_features, random.one_in(2), random);
    for (const Kernels* k : {implementations[0], implementations[random.below(int(implementations.size()))]}) {
      Output out(tokens, l.h.out_features, random.one_in(2), random);
      forward(*k, l, in.rows, out.rows, tokens, random_tiling(random), random.one_in(8) ? 2 : 1);
      out.check_margins(k->name);
    }
  }
  EXPECT(taken > count / 100 && taken < count * 3 / 4, "%d of %d damaged layers are taken", taken, count);
  return text("%d damaged layers, %d of them still taken for one", count, taken);
}
