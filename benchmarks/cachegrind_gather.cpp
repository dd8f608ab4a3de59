// The gather for given codes, in each loop order, as a program that cachegrind can run: benchmarks/cachegrind.py.
//
//   cachegrind_gather ORDER DTYPE ISA TOKENS T K E READS SLICE GROUPS_PER_BLOCK PREFETCH_TOKENS FLUSH_BYTES ROUNDS
//   CODES
//
// CODES is a file of int32 (tokens, T, reads). Caches are filled with FLUSH_BYTES of other memory before the first
// round. Prints where each buffer begins, in bytes, and the nanoseconds a token of the fastest round. Beyond 2,048
// tokens a sliced round also copies the codes of each chunk to their place, which then counts too.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dispatch.h"

using namespace lookupffn;

namespace {

constexpr int64_t kChunk = 2048;  // as in model/lookup.cpp

uint8_t* buffer(const char* name, size_t bytes) {
  const size_t whole = (bytes + 63) / 64 * 64;
  uint8_t* const memory = static_cast<uint8_t*>(std::aligned_alloc(64, whole));
  if (!memory) throw std::bad_alloc();
  std::memset(memory, 0, whole);
  std::printf("%s %zu\n", name, reinterpret_cast<size_t>(memory));
  return memory;
}

template <typename T>
T* buffer(const char* name, size_t count, T value) {
  T* const items = reinterpret_cast<T*>(buffer(name, count * sizeof(T)));
  std::fill(items, items + count, value);
  return items;
}

float widen(int8_t x) { return x; }
float widen(float x) { return x; }
float widen(uint16_t x) {  // bfloat16
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Plain {  // buffers and sizes of the two orders that take whole rows
  int64_t tokens, tables, table_rows, reads, width;
  const void* rows;      // [T][K][E]
  const int32_t* codes;  // [tokens][T][reads]
  const float* scores;
  const float* bias;
  float* y;

  template <typename Row>
  void add(int64_t token, int64_t table) const {
    float* __restrict out = y + token * width;
    for (int64_t slot = (token * tables + table) * reads, end = slot + reads; slot < end; slot++) {
      const Row* __restrict row = static_cast<const Row*>(rows) + (table * table_rows + codes[slot]) * width;
      const float score = scores[slot];
      for (int64_t i = 0; i < width; i++) out[i] += score * widen(row[i]);
    }
  }

  void start(int64_t token) const { std::memcpy(y + token * width, bias, sizeof(float) * width); }

  template <typename Row>
  void token_by_token() const {
    for (int64_t token = 0; token < tokens; token++) {
      start(token);
      for (int64_t table = 0; table < tables; table++) add<Row>(token, table);
    }
  }

  template <typename Row>
  void table_by_table() const {
    for (int64_t token = 0; token < tokens; token++) start(token);
    for (int64_t table = 0; table < tables; table++)
      for (int64_t token = 0; token < tokens; token++) add<Row>(token, table);
  }

  template <typename Row>
  void run(bool by_token) const {
    by_token ? token_by_token<Row>() : table_by_table<Row>();
  }
};

struct Sliced {  // what model/lookup.cpp has between its two phases
  const InferenceKernels& kernels;
  int groups_per_block;
  std::vector<int32_t> given;
  uint16_t* codes;
  GatherArgs args;

  // The codes of a chunk, as the kernel hash leaves them; their place serves every chunk.
  void fill(int64_t start, int64_t count) const {
    const TableSlices& s = args.tables;
    for (int64_t token = 0; token < count; token++)
      for (int t = 0; t < s.num_tables; t++)
        for (int n = 0; n < s.reads; n++)
          codes[token * s.slots() + (t / kLanes * s.reads + n) * kLanes + t % kLanes] =
              uint16_t(given[((start + token) * s.num_tables + t) * s.reads + n]);
  }

  void run(int64_t start, int64_t count) const {  // the second phase on one thread
    const int groups = groups_of(args.tables.num_tables);
    GatherArgs a = args;
    a.end = count, a.y_token = start;
    for (a.slice = 0; a.slice * a.tables.slice < a.out_features; a.slice++)
      for (a.first = 0; a.first < groups; a.first = a.last) {
        a.last = std::min(a.first + groups_per_block, groups);
        kernels.gather(a);
      }
  }
};

std::vector<int32_t> read_codes(const char* path, size_t count, int32_t rows) {
  std::vector<int32_t> codes(count);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(codes.data()), std::streamsize(count * sizeof(int32_t))))
    throw std::runtime_error(std::string(path) + " is too short");
  for (int32_t code : codes)
    if (code < 0 || code >= rows) throw std::runtime_error("a code lies outside its table");
  return codes;
}

volatile uint8_t sink;

void flush(size_t bytes) {
  const std::vector<uint8_t> other(bytes, 1);
  uint8_t sum = 0;
  for (size_t i = 0; i < bytes; i += 64) sum = uint8_t(sum + other[i]);
  sink = sum;
}

template <typename Body>
void rounds(int64_t count, int64_t tokens, const Body& body) {
  double best = 1e30;
  for (int64_t i = 0; i < count; i++) {
    const auto before = std::chrono::steady_clock::now();
    body();
    best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - before).count());
  }
  if (count) std::printf("ns_per_token %.1f\n", best / double(tokens));
}

void gather(char** argument) {
  const std::string order = argument[1], dtype = argument[2], isa = argument[3];
  const auto number = [&](int i) { return std::stoll(argument[i]); };
  const int64_t tokens = number(4), tables = number(5), table_rows = number(6), width = number(7), reads = number(8);
  const int64_t count = number(13);
  const size_t item = dtype == "int8" ? 1 : dtype == "bfloat16" ? 2 : 4;
  std::vector<int32_t> codes = read_codes(argument[14], size_t(tokens * tables * reads), int32_t(table_rows));
  if (order != "sliced") {
    const void* rows = buffer("tables", size_t(tables * table_rows * width) * item);
    int32_t* const codes_here = buffer<int32_t>("codes", codes.size(), 0);
    std::copy(codes.begin(), codes.end(), codes_here);
    const Plain plain = {tokens,
                         tables,
                         table_rows,
                         reads,
                         width,
                         rows,
                         codes_here,
                         buffer("scores", codes.size(), 0.01f),
                         buffer("bias", size_t(width), 0.5f),
                         buffer("y", size_t(tokens * width), 0.0f)};
    flush(size_t(number(12)));
    rounds(count, tokens, [&] {
      if (item == 1)
        plain.run<int8_t>(order == "token");
      else if (item == 2)
        plain.run<uint16_t>(order == "token");
      else
        plain.run<float>(order == "token");
    });
    return;
  }

  TableSlices s = {.type = item == 1   ? TableType::kInt8
                           : item == 2 ? TableType::kBFloat16
                                       : TableType::kFloat32,
                   .num_tables = int(tables),
                   .table_rows = int(table_rows),
                   .reads = int(reads),
                   .slice = int(number(9)),
                   .rows = nullptr};
  const size_t slices = size_t(width + s.slice - 1) / s.slice;
  s.rows = buffer("tables", slices * tables * s.table_bytes());
  const float* const bias = buffer("bias", slices * s.slice, 0.5f);
  const int64_t chunk = std::min(tokens, kChunk);
  const size_t slots = size_t(chunk) * s.slots();
  uint16_t* const places = buffer<uint16_t>("codes", slots, 0);
  void* scores = item == 1 ? static_cast<void*>(buffer<uint8_t>("scores", slots, 1)) : buffer("scores", slots, 0.01f);
  float* const score_scales = buffer("score_scales", size_t(chunk), 0.01f);
  float* const sums = buffer("sums", size_t(chunk) * s.slice, 0.0f);
  const GatherArgs args = {.tables = s,
                           .slice = 0,
                           .first = 0,
                           .last = 0,
                           .begin = 0,
                           .end = 0,
                           .codes = places,
                           .scores = scores,
                           .score_scales = score_scales,
                           .sums = sums,
                           .y = {buffer("y", size_t(tokens * width), 0.0f), width, false},
                           .y_token = 0,
                           .out_features = int(width),
                           .bias = bias,
                           .prefetch_tokens = int(number(11))};
  const Sliced sliced = {*implementation(isa_index(isa)).inference, int(number(10)), std::move(codes), places, args};
  sliced.fill(0, chunk);
  flush(size_t(number(12)));
  rounds(count, tokens, [&] {
    for (int64_t start = 0; start < tokens; start += chunk) {
      if (tokens > chunk) sliced.fill(start, std::min(chunk, tokens - start));
      sliced.run(start, std::min(chunk, tokens - start));
    }
  });
}

}  // namespace

int main(int count, char** argument) {
  try {
    if (count != 15) throw std::runtime_error("takes 14 arguments: see the head of this file");
    gather(argument);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cachegrind_gather: %s\n", error.what());
    return 1;
  }
}
