// Mutates schedule programs and runs whatever validate_program accepts. Compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer, it shows that no accepted bytes make the evaluator leave its memory or hang.
//
//   fuzz_program SEED ROUNDS PROGRAM...      prints how many mutants were accepted
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "core/schedule.h"

using namespace fused_sched;

static uint64_t state;

static uint64_t next_random() {  // xorshift64*, Vigna 2016
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545f4914f6cdd1d;
}

static std::vector<double> read_words(const char* path) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) exit(2);
  std::vector<double> words;
  double word;
  while (fread(&word, sizeof word, 1, file) == 1) words.push_back(word);
  fclose(file);
  return words;
}

int main(int argc, char** argv) {
  state = strtoull(argv[1], nullptr, 10) * 2 + 1;
  const long rounds = atol(argv[2]);
  const double times[] = {0, 1, 2, 9, 10, 11, 1e3, 1e6 + 1, 0x1p53, 0x1p63};
  const uint64_t doubles[] = {0,
                              1,
                              0x3ff0000000000000,
                              0xbff0000000000000,
                              0x7ff0000000000000,
                              0x7ff8000000000000,
                              0x7fefffffffffffff,
                              0xffefffffffffffff,
                              0x0010000000000000};
  long accepted = 0;
  for (int i = 3; i < argc; ++i) {
    const std::vector<double> original = read_words(argv[i]);
    for (long round = 0; round < rounds; ++round) {
      std::vector<double> words = original;  // on the heap, so that the sanitizer sees its exact end
      unsigned char* bytes = reinterpret_cast<unsigned char*>(words.data());
      const uint64_t size = words.size() * sizeof(double);
      for (uint64_t edits = 1 + next_random() % 3; edits > 0; --edits) {
        const uint64_t at = next_random() % size;
        switch (next_random() % 4) {
          case 0: bytes[at] = static_cast<unsigned char>(next_random()); break;
          case 1: bytes[at & ~uint64_t{3}] = static_cast<unsigned char>(next_random() % 8); break;
          case 2: memcpy(bytes + (at & ~uint64_t{7}), &doubles[next_random() % 9], 8); break;
          default: memcpy(bytes + (at & ~uint64_t{7}), bytes + (next_random() % size & ~uint64_t{7}), 8);
        }
      }
      if (validate_program(bytes, static_cast<int64_t>(size)) != nullptr) continue;
      ++accepted;
      double sum = 0.0;
      for (double t : times) sum += evaluate(bytes, t);
      if (sum == 0x1.23456789p-300) puts("");  // the results must be used, or they are not computed
    }
  }
  printf("%ld\n", accepted);
  return 0;
}
