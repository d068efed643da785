#define DIM 192
#include "prefill.inc"
