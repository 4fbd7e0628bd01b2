# Builds from source, in a clone: brew install --HEAD ./packaging/homebrew/tandem.rb
# Never tried: nobody here has a Mac. (scripts/check-packaging reads it with ruby.)
class Tandem < Formula
  desc "Runs very large mixture-of-experts language models from low-bit checkpoints"
  license any_of: ["MIT", "Apache-2.0"]
  # A published formula has homepage, url and sha256 of the archive of the source instead.
  head "file://#{File.expand_path("../..", __dir__)}", using: :git, branch: "main"

  depends_on "rust" => :build

  def install
    system "cargo", "install", "--locked", "--features", "wgpu", "--path", "crates/tandem", "--root", prefix
    generate_completions_from_executable(bin/"tandem", "completions", shells: [:bash, :zsh, :fish])
    system bin/"tandem", "man", man1
    (pkgshare/"models").install "models/fable-30m-MXFP4-Q8"
  end

  service do
    run [opt_bin/"tandem", "serve"]
    keep_alive true
  end

  test do
    assert_match "Tokyo", shell_output("#{bin}/tandem run --temperature 0 --model #{pkgshare}/models/fable-30m-MXFP4-Q8 " \
                                       "'What is the capital of Japan?'")
  end
end
