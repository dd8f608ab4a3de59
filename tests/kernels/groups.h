// The groups of tests and how a program runs them: PROGRAM [--long] [--seed N].
#pragma once

#include "tools.h"

struct Options {
  bool is_long = false;
  uint64_t seed = 1;
};

// Each returns what it tested, in words, or throws what is wrong.
typedef std::string Test(const Options&);
struct Group {
  const char* name;
  Test* run;
};

Test test_hash, test_layers, test_batches, test_refusals, test_damage, test_linear;  // kernel_tests
Test test_activations, test_linears, test_norms, test_sums, test_table_rows, test_pooling, test_heads, test_rotations,
    test_attention;  // encoder_tests
Test test_records, test_models, test_model_damage, test_calls;

inline int run_groups(int arguments, char** argument, std::initializer_list<Group> groups) {
  Options options;
  for (int i = 1; i < arguments; i++) {
    if (!strcmp(argument[i], "--long")) {
      options.is_long = true;
    } else if (!strcmp(argument[i], "--seed") && i + 1 < arguments) {
      options.seed = strtoull(argument[++i], nullptr, 10);
    } else {
      fprintf(stderr, "usage: %s [--long] [--seed N]\n", argument[0]);
      return 2;
    }
  }
  struct sigaction action = {};
  action.sa_handler = on_crash;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(signal, &action, &previous_action[signal]);
  bool failed = false;
  for (const auto& group : groups) {
    const auto start = std::chrono::steady_clock::now();
    std::string result, verdict = "ok    ";
    try {
      result = group.run(options);
    } catch (const std::exception& error) {
      verdict = "FAILED";
      result = std::string(error.what()) + "\n        in: " + current_case +
               text("\n        seed %llu", static_cast<unsigned long long>(options.seed));
      failed = true;
    }
    state_changed = false;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    printf("%s  %-9s %6.2f s  %s\n", verdict.c_str(), group.name, seconds, result.c_str());
    fflush(stdout);
  }
  return failed;
}
