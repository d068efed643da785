#define DIM 96
#include "prefill.inc"
