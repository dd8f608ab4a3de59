/* Opens a packed encoder and prints the first numbers of each token's hidden state, for ids from the command line:
 *
 *     cc examples/hidden.c -Icsrc/include -Lbuild -llookupffn_runtime -o hidden && ./hidden model.safetensors 101 7592
 * 102
 */
#include <stdio.h>
#include <stdlib.h>

#include "lookupffn.h"

static void check(const char* error) {
  if (!error) return;
  fprintf(stderr, "%s\n", error);
  exit(1);
}

int main(int argc, char** argv) {
  if (argc < 3) return fprintf(stderr, "usage: %s FILE ID...\n", argv[0]), 2;
  lookupffn_model* model;
  check(lookupffn_open(argv[1], &model));
  lookupffn_description about;
  lookupffn_describe(model, &about);
  int32_t length = argc - 2, *ids = malloc(sizeof *ids * length);
  for (int i = 0; i < length; i++) ids[i] = atoi(argv[2 + i]);
  lookupffn_batch batch = {1, &length, ids, NULL, NULL};
  size_t bytes;
  check(lookupffn_workspace(model, &batch, 1, &bytes));
  void* workspace = malloc(bytes);
  float* hidden = malloc(sizeof *hidden * length * about.hidden_size);
  check(lookupffn_run(model, &batch, hidden, NULL, workspace, bytes, NULL));
  for (int i = 0; i < length; i++)
    printf("%d: %.6f %.6f %.6f\n", ids[i], hidden[i * about.hidden_size], hidden[i * about.hidden_size + 1],
           hidden[i * about.hidden_size + 2]);
  free(hidden), free(workspace), free(ids), lookupffn_close(model);
  return 0;
}
