import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.crypto.Mac;
import javax.crypto.spec.SecretKeySpec;
import javax.security.auth.callback.Callback;
import javax.security.auth.login.AppConfigurationEntry;
import org.apache.kafka.common.security.auth.AuthenticateCallbackHandler;
import org.apache.kafka.common.security.oauthbearer.OAuthBearerExtensionsValidatorCallback;
import org.apache.kafka.common.security.oauthbearer.OAuthBearerToken;
import org.apache.kafka.common.security.oauthbearer.OAuthBearerValidatorCallback;

/**
 * Lets in who has a token of the tests' token server: HS256, with a subject, a scope and an end.
 *
 * <p>What a client says beside its token is a line in the file {@code jwt.log}, a system property.
 */
public class JwtValidator implements AuthenticateCallbackHandler {
    @Override
    public void configure(
            Map<String, ?> configs, String mechanism, List<AppConfigurationEntry> entries) {}

    @Override
    public void close() {}

    @Override
    public void handle(Callback[] callbacks) throws IOException {
        for (Callback callback : callbacks) {
            if (callback instanceof OAuthBearerExtensionsValidatorCallback) {
                OAuthBearerExtensionsValidatorCallback told =
                        (OAuthBearerExtensionsValidatorCallback) callback;
                Map<String, String> extensions = new TreeMap<>(told.inputExtensions().map());
                Files.writeString(
                        Path.of(System.getProperty("jwt.log")),
                        extensions + "\n",
                        StandardOpenOption.CREATE,
                        StandardOpenOption.APPEND);
                extensions.keySet().forEach(told::valid);
            }
            if (callback instanceof OAuthBearerValidatorCallback) {
                OAuthBearerValidatorCallback asked = (OAuthBearerValidatorCallback) callback;
                try {
                    asked.token(validate(asked.tokenValue()));
                } catch (Exception refused) {
                    asked.error("invalid_token", null, null);
                }
            }
        }
    }

    private static OAuthBearerToken validate(String token) throws Exception {
        String[] parts = token.split("\\.");
        Mac mac = Mac.getInstance("HmacSHA256");
        byte[] secret = System.getProperty("jwt.secret").getBytes(StandardCharsets.UTF_8);
        mac.init(new SecretKeySpec(secret, "HmacSHA256"));
        byte[] signature = mac.doFinal((parts[0] + "." + parts[1]).getBytes("UTF-8"));
        String claims = new String(Base64.getUrlDecoder().decode(parts[1]), "UTF-8");
        if (!Base64.getUrlEncoder().withoutPadding().encodeToString(signature).equals(parts[2])
                || !System.getProperty("jwt.scope").equals(claim(claims, "scope"))) {
            throw new IllegalArgumentException();
        }
        String subject = claim(claims, "sub");
        long ends = Long.parseLong(claim(claims, "exp")) * 1000;
        return new Token(token, subject, null, ends);
    }

    private static String claim(String claims, String name) {
        Matcher found = Pattern.compile("\"" + name + "\":\\s*\"?([^\",}]*)").matcher(claims);
        return found.find() ? found.group(1) : null;
    }
}
