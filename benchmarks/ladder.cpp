// ladder [--isa NAME] [--rung NAME]... [--tokens N] [--width D] [--tables T] [--bits TAU] [--reads N] [--threads N]
//        [--seconds S] [--runs N | --once] [--list]
//
// Checks every rung, or those named, against its definition in double precision, then times them round robin for about
// S seconds each and prints one JSON line a rung: median, fastest and 90th percentile of the rounds, microseconds a
// token. A call takes N tokens; calls take 2,048 tokens or more in turn, so that a token finds its rows where others
// left them.
// --seconds 0: the checks alone. --runs N: no check and no time, every rung runs N calls (--once: 1), for valgrind and
// for hardware counters. --list: the rungs' names. --width is that of the gather's outputs and of the projection's
// inputs. Exit code 1, and the rung's name, where a result is wrong.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "ladder.h"

using namespace lookupffn;

namespace {

constexpr double kBlockSeconds = 0.02;  // of one measurement: long enough to find one's own rows in the caches again
constexpr int kRounds = 5;              // at least
constexpr int64_t kInputs = 2048;
#ifdef __clang__
constexpr char kCompiler[] = __VERSION__;
#else
constexpr char kCompiler[] = "GCC " __VERSION__;
#endif

struct Options {
  std::string isa;
  std::vector<std::string> rungs;
  int64_t tokens = 64;
  int width = 512, tables = 128, bits = 8, reads = 1, threads = 2, runs = 0;
  double seconds = 0.2;
  bool list = false;
};

double number(const std::string& name, const std::string& text, double least, double most) {
  char* end;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || !(value >= least && value <= most))
    throw std::runtime_error(name + " must be a number from " + std::to_string(int64_t(least)) + " to " +
                             std::to_string(int64_t(most)) + ", not " + text);
  return value;
}

Options parse(int count, char** arguments) {
  Options o;
  for (int i = 1; i < count; i++) {
    const std::string name = arguments[i];
    if (name == "--list" || name == "--once") {
      if (name == "--list")
        o.list = true;
      else
        o.runs = 1;
      continue;
    }
    if (i + 1 == count) throw std::runtime_error("unknown or incomplete option " + name);
    const std::string value = arguments[++i];
    const auto whole = [&](double least, double most) { return int(number(name, value, least, most)); };
    if (name == "--isa")
      o.isa = value;
    else if (name == "--rung")
      o.rungs.push_back(value);
    else if (name == "--tokens")
      o.tokens = whole(1, 1 << 20);
    else if (name == "--width")
      o.width = whole(16, 1 << 14);
    else if (name == "--tables")
      o.tables = whole(1, 1 << 12);
    else if (name == "--bits")
      o.bits = whole(3, 12);  // fewer can give negative scores, which select negated tables
    else if (name == "--reads")
      o.reads = whole(1, kMaxReads);
    else if (name == "--threads")
      o.threads = whole(1, 256);
    else if (name == "--runs")
      o.runs = whole(1, 1e9);
    else if (name == "--seconds")
      o.seconds = number(name, value, 0, 3600);
    else
      throw std::runtime_error("unknown or incomplete option " + name);
  }
  if (o.width % 16) throw std::runtime_error("--width must be a multiple of 16, not " + std::to_string(o.width));
  return o;
}

struct Timed {
  const Rung* rung;
  Work work;
  std::string not_run;
  std::vector<double> us_per_token;

  double quantile(double q) {
    std::sort(us_per_token.begin(), us_per_token.end());
    return us_per_token[size_t(q * double(us_per_token.size() - 1) + 0.5)];
  }
};

class Calls {  // of a rung, on the inputs in turn
 public:
  explicit Calls(const Shape& shape) : shape_(shape) {}
  void run(const Work& work, int64_t count) {
    for (; count > 0; count--, next_ = (next_ + shape_.tokens) % shape_.inputs) work.run(next_);
  }

 private:
  const Shape& shape_;
  int64_t next_ = 0;
};

void time_round_robin(std::vector<Timed>& all, const Shape& shape, double seconds) {
  typedef std::chrono::steady_clock Clock;
  std::vector<int64_t> calls;
  std::vector<Calls> inputs(all.size(), Calls(shape));
  const auto timed = [&](size_t i, int64_t count) {
    const auto before = Clock::now();
    inputs[i].run(all[i].work, count);
    return std::chrono::duration<double>(Clock::now() - before).count();
  };
  for (size_t i = 0; i < all.size(); i++) {
    if (all[i].work.run) timed(i, 1);
    calls.push_back(all[i].work.run ? std::max<int64_t>(1, int64_t(kBlockSeconds / timed(i, 1))) : 0);
  }
  const int rounds = std::max(kRounds, int(seconds / kBlockSeconds));
  for (int round = 0; round < rounds; round++)
    for (size_t i = 0; i < all.size(); i++)
      if (calls[i]) all[i].us_per_token.push_back(timed(i, calls[i]) * 1e6 / double(calls[i] * shape.tokens));
}

void print(const Shape& s, Timed& t, bool shaped) {
  const Rung& r = *t.rung;
  std::printf("{\"stage\": \"%s\", \"rung\": \"%s\", \"from\": \"%s\", \"change\": \"%s\"", r.stage, r.name, r.from,
              r.change);
  if (shaped)
    std::printf(
        ", \"isa\": \"%s\", \"tokens\": %ld, \"width\": %d, \"tables\": %d, \"bits\": %d, \"reads\": %d, "
        "\"threads\": %d, \"compiler\": \"%s\"",
        r.isa, long(s.tokens), s.width, s.tables, s.bits, s.reads, r.threads, kCompiler);
  if (!t.us_per_token.empty())
    std::printf(", \"us_per_token\": %.6g, \"us_low\": %.6g, \"us_high\": %.6g", t.quantile(0.5), t.quantile(0),
                t.quantile(0.9));
  if (t.work.run) std::printf(", \"bytes_per_token\": %.6g", t.work.bytes_per_token);
  if (!t.not_run.empty()) std::printf(", \"not_run\": \"%s\"", t.not_run.c_str());
  std::printf("}\n");
}

std::vector<Rung> chosen(const Options& o, const Shape& shape, const Kernels& kernels) {
  std::vector<Rung> all = gather_rungs(shape, kernels), some;
  for (Rung& rung : projection_rungs(shape, kernels)) all.push_back(std::move(rung));
  if (o.rungs.empty()) return all;
  for (const std::string& name : o.rungs) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const Rung& rung) { return rung.name == name; });
    if (found == all.end()) throw std::runtime_error("there is no rung '" + name + "'; --list names them");
    some.push_back(*found);
  }
  return some;
}

// The one named, or the best that runs here and that the ladder has kernels for: not AMX, which is a rung by itself.
Kernels choose_kernels(const std::string& name) {
  int count, i = 0;
  const Isa* all = isas(&count);
  if (name.empty())
    while (!ladder_kernels(all[i].name) || !all[i].runs_here()) i++;  // the last one, scalar, it is at the latest
  else
    i = isa_index(name);
  const LadderKernels* const own = ladder_kernels(all[i].name);
  if (!own) throw std::runtime_error("the ladder has no small kernels for '" + name + "'");
  return {all[i].name, *implementation(i).inference, *own};
}

int climb(const Options& o) {
  const Kernels kernels = choose_kernels(o.isa);
  const int64_t calls = std::max<int64_t>(2, (kInputs + o.tokens - 1) / o.tokens);  // with different inputs
  const Shape shape = {o.tokens, calls * o.tokens, o.width, o.tables, o.bits, o.reads, o.threads};
  const std::vector<Rung> rungs = chosen(o, shape, kernels);
  std::vector<Timed> all;
  for (const Rung& rung : rungs) all.push_back({&rung, {}, "", {}});
  if (!o.list)
    for (Timed& t : all) {
      try {
        t.work = t.rung->prepare();
      } catch (const NotRun& reason) {
        t.not_run = reason.what();
        continue;
      }
      if (o.runs) {
        Calls(shape).run(t.work, o.runs);
      } else if (const std::string wrong = t.work.check(); !wrong.empty()) {
        std::fprintf(stderr, "ladder: %s: %s\n", t.rung->name, wrong.c_str());
        return 1;
      }
    }
  if (!o.list && !o.runs && o.seconds > 0) time_round_robin(all, shape, o.seconds);
  for (Timed& t : all) print(shape, t, !o.list);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return climb(parse(count, arguments));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ladder: %s\n", error.what());
    return 1;
  }
}
