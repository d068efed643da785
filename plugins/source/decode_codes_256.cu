#define DIM 256
#include "decode_codes.inc"
