#define DIM 32
#include "prefill.inc"
