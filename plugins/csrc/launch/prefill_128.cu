#define DIM 128
#include "prefill.inc"
