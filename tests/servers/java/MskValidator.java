import java.io.IOException;
import java.net.URI;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.security.MessageDigest;
import java.time.Instant;
import java.time.ZoneOffset;
import java.time.format.DateTimeFormatter;
import java.util.ArrayList;
import java.util.Base64;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Set;
import javax.crypto.Mac;
import javax.crypto.spec.SecretKeySpec;
import javax.security.auth.callback.Callback;
import javax.security.auth.callback.UnsupportedCallbackException;
import javax.security.auth.login.AppConfigurationEntry;
import org.apache.kafka.common.errors.SaslAuthenticationException;
import org.apache.kafka.common.security.auth.AuthenticateCallbackHandler;
import org.apache.kafka.common.security.oauthbearer.OAuthBearerToken;
import org.apache.kafka.common.security.oauthbearer.OAuthBearerValidatorCallback;

/**
 * Lets in who has a token as MSK takes them: its form, host, action, times, scope and signature.
 *
 * <p>System properties: {@code msk.region}; {@code msk.keys}, a file with a line "key secret" for
 * each who may connect; {@code msk.log}, a file that gets a line for each login. A session token
 * is "expires-MILLISECONDS-" and anything, and says when its credentials end.
 */
public class MskValidator implements AuthenticateCallbackHandler {
    private static final DateTimeFormatter TIME =
            DateTimeFormatter.ofPattern("yyyyMMdd'T'HHmmss'Z'").withZone(ZoneOffset.UTC);

    @Override
    public void configure(
            Map<String, ?> configs, String mechanism, List<AppConfigurationEntry> entries) {}

    @Override
    public void close() {}

    @Override
    public void handle(Callback[] callbacks) throws IOException, UnsupportedCallbackException {
        for (Callback callback : callbacks) {
            if (!(callback instanceof OAuthBearerValidatorCallback)) {
                continue; // extensions, of which there are none
            }
            OAuthBearerValidatorCallback asked = (OAuthBearerValidatorCallback) callback;
            String why;
            try {
                asked.token(validate(asked.tokenValue()));
                why = "accepted " + asked.token().principalName();
            } catch (Exception refused) {
                why = "refused " + refused.getMessage();
            }
            Files.writeString(
                    Path.of(System.getProperty("msk.log")),
                    System.currentTimeMillis() + " " + why + "\n",
                    StandardOpenOption.CREATE,
                    StandardOpenOption.APPEND);
            if (asked.token() == null) {
                // What MSK says, whatever the reason.
                throw new SaslAuthenticationException("[2f6a-11]: Access denied");
            }
        }
    }

    private static void check(boolean holds, String what) {
        if (!holds) {
            throw new IllegalArgumentException(what);
        }
    }

    static OAuthBearerToken validate(String token) throws Exception {
        check(!token.contains("="), "padding");
        String region = System.getProperty("msk.region");
        String text = new String(Base64.getUrlDecoder().decode(token), StandardCharsets.UTF_8);
        URI url = URI.create(text);
        String host = "kafka." + region + ".amazonaws.com";
        check("https".equals(url.getScheme()), "scheme");
        check(host.equals(url.getRawAuthority()), "host " + url.getRawAuthority());
        check("/".equals(url.getRawPath()), "path");
        Map<String, String> query = new HashMap<>();
        List<String> signed = new ArrayList<>();
        for (String pair : url.getRawQuery().split("&")) {
            String[] parts = pair.split("=", 2);
            String value = URLDecoder.decode(parts[1], StandardCharsets.UTF_8);
            check(query.put(parts[0], value) == null, "twice " + parts[0]);
            if (!Set.of("X-Amz-Signature", "User-Agent").contains(parts[0])) {
                signed.add(pair);
            }
        }
        check("kafka-cluster:Connect".equals(query.get("Action")), "action");
        check("AWS4-HMAC-SHA256".equals(query.get("X-Amz-Algorithm")), "algorithm");
        check("host".equals(query.get("X-Amz-SignedHeaders")), "signed headers");
        check("900".equals(query.get("X-Amz-Expires")), "expires");
        check(query.get("User-Agent") != null, "user agent");
        String time = query.get("X-Amz-Date");
        long begins = Instant.from(TIME.parse(time)).toEpochMilli();
        long ends = begins + 900_000;
        long now = System.currentTimeMillis();
        check(begins <= now + 5_000 && now < ends, "time " + time);
        String[] scope = query.get("X-Amz-Credential").split("/");
        check(scope.length == 5 && scope[1].equals(time.substring(0, 8)), "scope");
        check(scope[2].equals(region), "region " + scope[2]);
        check(scope[3].equals("kafka-cluster") && scope[4].equals("aws4_request"), "service");
        String secret = null;
        for (String line : Files.readAllLines(Path.of(System.getProperty("msk.keys")))) {
            String[] parts = line.split(" ");
            secret = parts[0].equals(scope[0]) ? parts[1] : secret;
        }
        check(secret != null, "who may not connect: " + scope[0]);
        String session = query.get("X-Amz-Security-Token");
        if (session != null) {
            long over = Long.parseLong(session.split("-")[1]);
            check(now < over, "credentials that are over");
            ends = Math.min(ends, over);
        }
        signed.sort(null);
        String request = String.join(
                "\n", "GET", "/", String.join("&", signed), "host:" + host, "", "host", hash(""));
        String place = String.join("/", scope[1], scope[2], scope[3], scope[4]);
        String toSign = String.join("\n", "AWS4-HMAC-SHA256", time, place, hash(request));
        byte[] key = ("AWS4" + secret).getBytes(StandardCharsets.UTF_8);
        for (int part = 1; part < scope.length; part++) {
            key = hmac(key, scope[part]);
        }
        String signature = HexFormat.of().formatHex(hmac(key, toSign));
        check(signature.equals(query.get("X-Amz-Signature")), "signature");
        return new Token(token, scope[0], begins, ends);
    }

    private static String hash(String text) throws Exception {
        byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
        return HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(bytes));
    }

    private static byte[] hmac(byte[] key, String text) throws Exception {
        Mac mac = Mac.getInstance("HmacSHA256");
        mac.init(new SecretKeySpec(key, "HmacSHA256"));
        return mac.doFinal(text.getBytes(StandardCharsets.UTF_8));
    }
}
