// The loops of inference, written once over the 16-lane shim that was included before this file.
//
// In the integer paths (int8 and int16 weights, int8 tables) every rounding is written out and sums are exact, so codes
// and outputs are the same bits on every instruction set.
#include "project-inl.h"
#include "hash-inl.h"
#include "gather-inl.h"
