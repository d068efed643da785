#define SETS 1
#include "decode_codes.inc"
