#define DIM 64
#include "prefill.inc"
