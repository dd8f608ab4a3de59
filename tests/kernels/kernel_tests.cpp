// Tests of the kernels and the engine, without torch: kernel_tests [--long] [--seed N]. Exit code 1 and a line FAILED
// with the case where something is wrong.
//
// The reference (reference.h) is double precision, written from the layer's definition (reference.py) and its packed
// form (layer.h), with a bound on how far float32 may be from it. The hash is discontinuous, so the parts of the layer
// are tested one by one, each on what the part before it gave; then forward() must give the very bits of the parts, run
// one token at a time, for every batch, tiling and number of threads. The scalar implementation is tested against the
// reference, the others that run here against both: the same bits wherever a part computes with integers, and in hash.
// Buffers end where a page begins that cannot be touched: reading or writing past one is caught in every build.
#include "groups.h"

std::string test_dispatch(const Options&) {
  int count;
  const Isa* all = isas(&count);
  std::string names;
  bool first = true;
  const char* forced = std::getenv("LOOKUPFFN_ISA");
  for (int i = 0; i < count; i++) {
    set_case(all[i].name);
    if (all[i].runs_here()) {
      EXPECT(isa_index(all[i].name) == i, "its name gives another");
      EXPECT(!first || (forced && *forced) || isa_index() == i, "the first that runs is not the one in use");
      EXPECT(implementation(i).inference && implementation(i).training && implementation(i).encoder,
             "it has no kernels");
      first = false;
      names += std::string(names.empty() ? "" : ", ") + all[i].name;
    } else {
      try {
        isa_index(all[i].name);
        throw std::logic_error("");
      } catch (const std::runtime_error& error) {
        EXPECT(strstr(error.what(), all[i].needs), "the error does not say what it needs: %s", error.what());
      } catch (const std::logic_error&) {
        EXPECT(false, "it does not run here, but is given");
      }
    }
  }
  EXPECT(all[count - 1].name == std::string("scalar") && all[count - 1].runs_here(), "the last must be scalar");
  bool refused = false;
  try {
    isa_index("pentium");
  } catch (const std::runtime_error&) {
    refused = true;
  }
  EXPECT(refused, "an unknown name is taken");
  return names + "; in use: " + all[isa_index()].name;
}

int main(int arguments, char** argument) {
  return run_groups(arguments, argument,
                    {{"dispatch", test_dispatch},
                     {"linear", test_linear},
                     {"hash", test_hash},
                     {"layers", test_layers},
                     {"batches", test_batches},
                     {"refusals", test_refusals},
                     {"damage", test_damage}});
}
