// The regular expressions of tokenizer.json files, as Oniguruma reads them: alternatives, groups,
// (?i:...), look-ahead, atomic groups, classes with \p{..}, greedy, lazy and possessive repeats.
// Left out, and refused: back-references, look-behind, scripts, class intersections.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mx {

class Regex {
public:
    // Throws Error (unsupported) when the pattern holds what is not known here.
    explicit Regex(std::string_view pattern);

    struct Match {
        size_t begin, end;  // characters
    };

    // All matches from left to right that do not overlap and are not empty.
    // Throws Error when the search takes out of all proportion to the text.
    std::vector<Match> find_all(std::u32string_view text) const;

private:
    friend class RegexCompiler;
    friend class RegexMatcher;

    // What one character of the text is compared with.
    struct Set {
        struct Item {
            enum class Kind : uint8_t { kRange, kCategories, kSpace, kWord } kind;
            bool negated;
            uint32_t low, high;  // kCategories: low is the mask
        };
        std::vector<Item> items;
        bool negated = false;

        bool contains(char32_t c) const;
    };

    enum class Op : uint8_t {
        kSet,       // one character of set a
        kRepeat,    // a to b of the next instruction's set, then go on behind that
        kSplit,     // try a, then b
        kJump,      // to a
        kLook,      // what stands between here and a must match ahead (b: must not)
        kAtomic,    // what stands between here and a matches once, and is not tried again
        kLineStart,
        kLineEnd,
        kEnd        // of the pattern, a look-ahead or an atomic group
    };
    enum class Greed : uint8_t { kGreedy, kLazy, kPossessive };

    struct Instruction {
        Op op;
        Greed greed;
        uint32_t a, b;
    };

    std::vector<Instruction> program_;
    std::vector<Set> sets_;
};

}  // namespace mx
