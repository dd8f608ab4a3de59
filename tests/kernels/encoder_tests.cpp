// Tests of what whole encoders run, without torch: encoder_tests [--long] [--seed N]. Exit code 1 and a line FAILED
// with the case where something is wrong.
//
// Each kernel of every implementation that runs here is compared with double precision (encoder_reference.h), within a
// bound on float32 that is derived beside it; where it computes with integers, with these. A row must have the same
// bits whatever the other rows are. Then packed models, sound and damaged, by their records and by the C interface.
// Buffers end where a page begins that cannot be touched: reading or writing past one is caught in every build.
#include "groups.h"

int main(int arguments, char** argument) {
  return run_groups(arguments, argument,
                    {{"activations", test_activations},
                     {"linears", test_linears},
                     {"norms", test_norms},
                     {"sums", test_sums},
                     {"table rows", test_table_rows},
                     {"pooling", test_pooling},
                     {"heads", test_heads},
                     {"rotations", test_rotations},
                     {"attention", test_attention},
                     {"records", test_records},
                     {"models", test_models},
                     {"damage", test_model_damage},
                     {"calls", test_calls}});
}
